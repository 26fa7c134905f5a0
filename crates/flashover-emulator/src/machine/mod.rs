//! The machine: runs kernels of PTX, warp by warp.

mod arithmetic;
mod block;
mod code;
mod copies;
mod floats;
mod integers;
mod lanewise;
mod matrices;
mod memory;
mod numbers;
mod registers;
mod schedule;
mod synchronize;
#[cfg(test)]
mod tests;
mod warp;
mod warpgroup;

use std::sync::Arc;

pub use crate::ptx::Param;
pub use code::Function;

/// Kernels that were loaded together.
pub struct Module {
    functions: Vec<Arc<Function>>,
}

impl Module {
    /// Kernels from their text; what is not known here is an error.
    pub fn parse(ptx: &str) -> Result<Module, String> {
        let functions = crate::ptx::parse(ptx)?.into_iter().map(|entry| code::Builder::function(entry).map(Arc::new));
        Ok(Module { functions: functions.collect::<Result<_, _>>()? })
    }

    /// A kernel by its name.
    pub fn function(&self, name: &str) -> Option<Arc<Function>> {
        self.functions.iter().find(|function| function.name == name).cloned()
    }
}

/// How a kernel is launched.
pub struct Launch {
    /// Blocks in each dimension.
    pub grid: [u32; 3],
    /// Threads of a block in each dimension.
    pub block: [u32; 3],
    /// Bytes of shared memory behind those that the kernel declares.
    pub dynamic_shared: usize,
    /// The parameters, each at its offset.
    pub params: Vec<u8>,
}

/// Runs a kernel to its end. Errors say which block, which warp, and which line of the PTX.
pub fn launch(function: &Function, launch: &Launch) -> Result<(), String> {
    schedule::run(function, launch, crate::memory::snapshot())
}
