//! Modules, their functions, and launches.

use std::any::Any;
use std::ffi::c_void;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use super::device::{SHARED, current, emulated};
use super::handle::{Array, Handle, Handles, Out, Text};
use super::status::Status::{self, InvalidImage, InvalidPtx, InvalidValue, NotFound, NotSupported};
use super::status::{Answer, alive, driver, fail, refuse};
use super::{device, stream};
use crate::machine::{Function, Launch, Module, launch};

/// A function of a module.
struct Kernel {
    function: Arc<Function>,
    /// Most bytes of shared memory that a launch may add.
    dynamic: AtomicI32,
}

static MODULES: Handles<Module> = Handles::new(0x30);
static KERNELS: Handles<Kernel> = Handles::new(0xf0);

/// Writes PTX into a folder, under the name of its first kernel.
fn dump(folder: &Path, ptx: &str) {
    let name = ptx.split_once(".entry").map_or("module", |(_, rest)| rest.split('(').next().unwrap_or_default().trim());
    let mut hash = DefaultHasher::new();
    ptx.hash(&mut hash);
    let name: String = name.chars().take(100).map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let path = folder.join(format!("{name}-{:016x}.ptx", hash.finish()));
    if let Err(error) = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, ptx)) {
        eprintln!("flashover-emulator: {}: {error}", path.display());
    }
}

fn load(out: Out<Handle>, image: Text) -> Answer {
    current()?;
    let ptx = image.read()?;
    if !ptx.contains(".version") {
        return Err(refuse(InvalidImage, "a module that is not PTX is not emulated"));
    }
    if let Some(folder) = std::env::var_os("FLASHOVER_EMULATOR_DUMP") {
        dump(folder.as_ref(), &ptx);
    }
    let module =
        Module::parse(&ptx).map_err(|error| refuse(InvalidPtx, format_args!("a module was refused: {error}")))?;
    out.put(MODULES.add(module))
}

/// The bytes of the parameters, each at its place.
fn gather(function: &Function, pointers: Array<Array<u8>>) -> Result<Vec<u8>, Status> {
    let pointers = pointers.read(function.params.len())?;
    let end = function.params.iter().map(|param| param.offset + param.size).max().unwrap_or(0);
    let mut params = vec![0; end];
    for (param, pointer) in function.params.iter().zip(pointers) {
        params[param.offset..param.offset + param.size].copy_from_slice(&pointer.read(param.size)?);
    }
    Ok(params)
}

/// What is wrong with a launch, if anything is.
fn problem(kernel: &Kernel, grid: [u32; 3], block: [u32; 3], shared: u32) -> Option<String> {
    let limit = |attribute| emulated().attribute(attribute).expect("a limit of the device") as u32;
    let (most_threads, most_shared) = (limit(1), kernel.dynamic.load(Ordering::Acquire));
    let threads: u64 = block.iter().map(|&len| len as u64).product();
    if (0..3).any(|d| grid[d] == 0 || grid[d] > limit(5 + d as u32)) {
        return Some(format!("a grid of {grid:?}"));
    }
    if (0..3).any(|d| block[d] == 0 || block[d] > limit(2 + d as u32)) || threads > most_threads as u64 {
        return Some(format!("blocks of {block:?}"));
    }
    (shared as i64 > most_shared as i64)
        .then(|| format!("{shared} bytes of shared memory where cuFuncSetAttribute allows {most_shared}"))
}

fn text_of(panic: Box<dyn Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    format!("the emulator panicked: {}", text.unwrap_or("without a text"))
}

driver! {
    fn cuModuleLoadData(out: Out<Handle>, image: Text) {
        load(out, image)
    }

    /// The options are for a compiler that is not there.
    fn cuModuleLoadDataEx(out: Out<Handle>, image: Text, _count: u32, _options: Array<u32>, _values: Array<Handle>) {
        load(out, image)
    }

    fn cuModuleUnload(module: Handle) {
        MODULES.remove(module)?;
        alive()
    }

    fn cuModuleGetFunction(out: Out<Handle>, module: Handle, name: Text) {
        current()?;
        let function = MODULES.get(module)?.function(&name.read()?).ok_or(NotFound)?;
        let dynamic = AtomicI32::new(SHARED.saturating_sub(function.static_shared as i32));
        out.put(KERNELS.add(Kernel { function, dynamic }))
    }

    fn cuFuncGetAttribute(out: Out<i32>, attribute: u32, function: Handle) {
        alive()?;
        let kernel = KERNELS.get(function)?;
        out.put(match attribute {
            0 => 1024,                                    // MAX_THREADS_PER_BLOCK
            1 => kernel.function.static_shared as i32,    // SHARED_SIZE_BYTES
            2 | 3 | 7 => 0,                               // CONST_SIZE_BYTES, LOCAL_SIZE_BYTES, CACHE_MODE_CA
            4 => 32,                                      // NUM_REGS, which nobody counts here
            5 | 6 => emulated().capability,                        // PTX_VERSION, BINARY_VERSION
            8 => kernel.dynamic.load(Ordering::Acquire),  // MAX_DYNAMIC_SHARED_SIZE_BYTES
            9 => -1,                                      // PREFERRED_SHARED_MEMORY_CARVEOUT: the default
            _ => return Err(refuse(InvalidValue, format_args!("unknown CUfunction_attribute {attribute}"))),
        })
    }

    fn cuFuncSetAttribute(function: Handle, attribute: u32, value: i32) {
        alive()?;
        let kernel = KERNELS.get(function)?;
        match attribute {
            8 => {
                let most = emulated().shared - kernel.function.static_shared as i32;
                if !(0..=most).contains(&value) {
                    let name = &kernel.function.name;
                    let message = format_args!("{name}: {value} bytes of shared memory where {most} are left");
                    return Err(refuse(InvalidValue, message));
                }
                kernel.dynamic.store(value, Ordering::Release);
                Ok(())
            }
            9 => Ok(()),
            _ => Err(refuse(NotSupported, format_args!("attribute {attribute} of functions is not emulated"))),
        }
    }

    fn cuFuncSetCacheConfig(function: Handle, _config: u32) {
        alive()?;
        KERNELS.get(function).map(|_| ())
    }

    fn cuLaunchKernel(
        function: Handle,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        shared: u32,
        stream: Handle,
        params: Array<Array<u8>>,
        extra: *mut *mut c_void,
    ) {
        current()?;
        stream::check(stream)?;
        let kernel = KERNELS.get(function)?;
        let name = &kernel.function.name;
        if !extra.is_null() {
            return Err(refuse(NotSupported, format_args!("{name}: parameters in a buffer are not emulated")));
        }
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        if let Some(problem) = problem(&kernel, grid, block, shared) {
            return Err(refuse(InvalidValue, format_args!("{name}: the launch was refused: {problem}")));
        }
        let params = gather(&kernel.function, params)?;
        let _device = device();
        let request = Launch { grid, block, dynamic_shared: shared as usize, params };
        let result = catch_unwind(AssertUnwindSafe(|| launch(&kernel.function, &request)));
        result.unwrap_or_else(|panic| Err(text_of(panic))).map_err(|message| fail(name, &message))
    }
}
