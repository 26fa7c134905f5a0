//! What functions of the driver return, and the failure that stays.

use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use super::handle::Out;

/// `CUresult`, as far as it is used.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Success = 0,
    InvalidValue = 1,
    OutOfMemory = 2,
    NotInitialized = 3,
    InvalidDevice = 101,
    InvalidImage = 200,
    InvalidContext = 201,
    InvalidPtx = 218,
    InvalidHandle = 400,
    NotFound = 500,
    LaunchFailed = 719,
    NotSupported = 801,
    Unknown = 999,
}

use Status::*;

const NAMES: [(Status, &CStr, &CStr); 13] = [
    (Success, c"CUDA_SUCCESS", c"no error"),
    (InvalidValue, c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
    (OutOfMemory, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
    (NotInitialized, c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
    (InvalidDevice, c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
    (InvalidImage, c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid"),
    (InvalidContext, c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
    (InvalidPtx, c"CUDA_ERROR_INVALID_PTX", c"a PTX JIT compilation failed"),
    (InvalidHandle, c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
    (NotFound, c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
    (LaunchFailed, c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
    (NotSupported, c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"),
    (Unknown, c"CUDA_ERROR_UNKNOWN", c"unknown error"),
];

/// What a function of the driver gives.
pub(crate) type Answer = Result<(), Status>;

/// Set by a launch that failed.
static FAILED: AtomicBool = AtomicBool::new(false);

/// Fails when a launch has failed: as on a GPU, the context is then lost for good.
pub(super) fn alive() -> Answer {
    if FAILED.load(Ordering::Acquire) { Err(LaunchFailed) } else { Ok(()) }
}

/// A kernel has failed.
pub(super) fn fail(kernel: &str, message: &str) -> Status {
    eprintln!("flashover-emulator: {kernel}: {message}");
    FAILED.store(true, Ordering::Release);
    LaunchFailed
}

/// Explains what is returned.
pub(super) fn refuse(status: Status, message: impl std::fmt::Display) -> Status {
    eprintln!("flashover-emulator: {message}");
    status
}

/// Turns an answer into what C gets. No panic leaves: there is nobody to catch it.
pub(super) fn answer(function: &str, body: impl FnOnce() -> Answer) -> Status {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => Success,
        Ok(Err(status)) => status,
        Err(_) => refuse(Unknown, format_args!("{function} panicked")),
    }
}

/// Defines functions of the driver, whose bodies give an [`Answer`].
macro_rules! driver {
    ($($(#[$doc:meta])* fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        #[allow(non_snake_case)]
        pub(crate) extern "C" fn $name($($argument: $kind),*) -> $crate::driver::status::Status {
            $crate::driver::status::answer(stringify!($name), move || $body)
        }
    )*};
}
pub(super) use driver;

fn text(
    code: u32,
    of: impl Fn(&(Status, &'static CStr, &'static CStr)) -> &'static CStr,
    out: Out<*const c_char>,
) -> Answer {
    match NAMES.iter().find(|row| row.0 as u32 == code) {
        Some(row) => out.put(of(row).as_ptr()),
        None => out.put(std::ptr::null()).and(Err(InvalidValue)),
    }
}

driver! {
    fn cuGetErrorName(code: u32, out: Out<*const c_char>) {
        text(code, |row| row.1, out)
    }

    fn cuGetErrorString(code: u32, out: Out<*const c_char>) {
        text(code, |row| row.2, out)
    }
}
