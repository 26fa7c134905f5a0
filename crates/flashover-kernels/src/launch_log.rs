//! What really ran: every kernel and every native path notes its launch here while somebody listens.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// One launch, as the launching code saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's name, as `explain` gives it.
    pub kernel: &'static str,
    /// Its configuration, as `explain` prints it.
    pub config: String,
    /// Storage buffers that the kernel binds; 0 on the CPU.
    pub bindings: usize,
    /// Shared memory of a cube in bytes; 0 on the CPU.
    pub shared_bytes: usize,
    /// Units of a cube; 0 on the CPU.
    pub units: usize,
    /// Device or host memory taken for the launch beyond its operands and results, in bytes.
    pub scratch_bytes: usize,
}

static LISTENERS: AtomicUsize = AtomicUsize::new(0);
static LOG: Mutex<Vec<Launch>> = Mutex::new(Vec::new());
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Notes a launch if somebody listens; `launch` is not called otherwise.
pub fn note(launch: impl FnOnce() -> Launch) {
    if LISTENERS.load(Ordering::Relaxed) > 0 {
        let launch = launch();
        LOG.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(launch);
    }
}

/// Runs `work` and returns what was launched meanwhile, by any thread of the process. A deferring backend (Fusion)
/// must be synchronized inside `work`.
pub fn listen<R>(work: impl FnOnce() -> R) -> (R, Vec<Launch>) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    LOG.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();
    LISTENERS.fetch_add(1, Ordering::SeqCst);
    let result = work();
    LISTENERS.fetch_sub(1, Ordering::SeqCst);
    (result, std::mem::take(&mut LOG.lock().unwrap_or_else(|poisoned| poisoned.into_inner())))
}
