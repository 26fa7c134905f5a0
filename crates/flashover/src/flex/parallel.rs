//! Tasks over threads.

use std::sync::Mutex;

/// Work below this many multiply-adds is not worth waking a thread.
const WORTH_A_THREAD: usize = 1 << 18;

/// Runs `work` on every task, each thread with scratch of its own. Tasks are taken in order by whichever thread is
/// free; as they write to separate places, the result does not depend on who takes which.
pub(super) fn for_each<Task: Send, Scratch>(
    tasks: impl ExactSizeIterator<Item = Task> + Send,
    multiply_adds: usize,
    scratch: impl Fn() -> Scratch + Sync,
    work: impl Fn(&mut Scratch, Task) + Sync,
) {
    let threads = rayon::current_num_threads().min(tasks.len());
    if threads <= 1 || multiply_adds < WORTH_A_THREAD {
        let mut scratch = scratch();
        tasks.for_each(|task| work(&mut scratch, task));
        return;
    }
    let tasks = Mutex::new(tasks);
    let next = || tasks.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
    rayon::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|_| {
                let mut scratch = scratch();
                while let Some(task) = next() {
                    work(&mut scratch, task);
                }
            });
        }
    });
}
