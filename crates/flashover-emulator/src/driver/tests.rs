use std::ffi::{CStr, c_char};
use std::ptr::null_mut;

use super::copy::*;
use super::device::*;
use super::handle::{Array, Handle, Out, Text};
use super::module::*;
use super::status::Status::*;
use super::status::{Status, cuGetErrorName, cuGetErrorString};
use super::stream::*;
use super::tensor::cuTensorMapEncodeTiled;
use crate::tensor_map::TensorMap;

/// What a function writes through its pointer, and what it returns.
fn out<T: Default>(call: impl FnOnce(Out<T>) -> Status) -> (T, Status) {
    let mut value = T::default();
    let status = call(Out::to(&mut value));
    (value, status)
}

fn ok<T: Default>(call: impl FnOnce(Out<T>) -> Status) -> T {
    let (value, status) = out(call);
    assert_eq!(status, Success);
    value
}

/// Makes the context the thread's own.
fn start() {
    assert_eq!(cuInit(0), Success);
    let context = ok(|out| cuDevicePrimaryCtxRetain(out, 0));
    assert_eq!(cuCtxSetCurrent(context), Success);
}

#[test]
fn one_device_that_is_an_sm_90() {
    start();
    assert_eq!(ok(|out| cuDriverGetVersion(out)), 13000);
    assert_eq!((ok(|out| cuDeviceGetCount(out)), ok(|out| cuDeviceGet(out, 0))), (1, 0));
    assert_eq!(out(|out| cuDeviceGet(out, 1)), (0, InvalidDevice));
    // What CubeCL asks: compute capability, warp, shared memory, threads, blocks, grid, multiprocessors.
    let asked = [75, 76, 10, 97, 1, 2, 3, 4, 5, 6, 7, 16];
    let values = asked.map(|attribute| ok(|out| cuDeviceGetAttribute(out, attribute, 0)));
    assert_eq!(values, [9, 0, 32, 232448, 1024, 1024, 1024, 64, i32::MAX, 65535, 65535, 4]);
    assert_eq!(ok(|out| cuDeviceGetAttribute(out, 81, 0)), 233472);
    assert_eq!(out(|out| cuDeviceGetAttribute(out, 1000, 0)), (0, InvalidValue));
    let mut name = [1 as c_char; 10];
    assert_eq!(cuDeviceGetName(Out::to(&mut name[0]), 10, 0), Success);
    assert_eq!(name.map(|c| c as u8), *b"flashover\0", "cut off");
}

#[test]
fn a_thread_without_a_context_can_do_little() {
    assert_eq!(cuInit(0), Success);
    assert_eq!(ok::<Handle>(|out| cuCtxGetCurrent(out)), 0);
    assert_eq!(out(|out| cuMemAlloc_v2(out, 16)), (0, InvalidContext));
    assert_eq!(cuCtxSetCurrent(1), InvalidContext);
    start();
    assert_ne!(ok::<Handle>(|out| cuCtxGetCurrent(out)), 0);
    assert_eq!(cuCtxSynchronize(), Success);
}

#[test]
fn errors_have_names() {
    let text = |of: extern "C" fn(u32, Out<*const c_char>) -> Status, code| {
        let mut text = std::ptr::null();
        assert_eq!(of(code, Out::to(&mut text)), Success);
        // SAFETY: the driver gives texts that stay.
        unsafe { CStr::from_ptr(text) }.to_str().unwrap()
    };
    assert_eq!(text(cuGetErrorName, 719), "CUDA_ERROR_LAUNCH_FAILED");
    assert_eq!(text(cuGetErrorString, 1), "invalid argument");
    assert_eq!(cuGetErrorName(12345, Out::to(&mut std::ptr::null())), InvalidValue);
}

#[test]
fn streams_and_events_are_known_by_their_handles() {
    start();
    let stream = ok(|out| cuStreamCreate(out, 1));
    assert_eq!(cuStreamSynchronize(stream), Success);
    let (a, b) = (ok(|out| cuEventCreate(out, 0)), ok(|out| cuEventCreate(out, 0)));
    assert_eq!(out(|out| cuEventElapsedTime_v2(out, a, b)).1, InvalidHandle, "not recorded");
    assert_eq!((cuEventRecord(a, stream), cuEventRecord(b, 0)), (Success, Success));
    assert!(ok(|out| cuEventElapsedTime_v2(out, a, b)) >= 0.0);
    assert!(ok(|out| cuEventElapsedTime_v2(out, b, a)) <= 0.0);
    assert_eq!(cuStreamWaitEvent(stream, a, 0), Success);
    assert_eq!(cuStreamSynchronize(a), InvalidHandle, "an event is no stream");
    assert_eq!((cuEventDestroy_v2(a), cuEventDestroy_v2(a)), (Success, InvalidHandle));
    assert_eq!((cuStreamDestroy_v2(stream), cuStreamSynchronize(stream)), (Success, InvalidHandle));
}

#[test]
fn copies_go_there_and_back() {
    start();
    let (a, b) = (ok(|out| cuMemAlloc_v2(out, 64)), ok(|out| cuMemAllocAsync(out, 64, 0)));
    let input: Vec<u8> = (0..64).collect();
    let mut output = vec![0u8; 64];
    assert_eq!(cuMemcpyHtoDAsync_v2(a, input.as_ptr().cast(), 64, 0), Success);
    assert_eq!(cuMemcpyDtoDAsync_v2(b, a, 32, 0), Success);
    assert_eq!(cuMemcpyDtoH_v2(output.as_mut_ptr().cast(), b, 64), Success);
    assert_eq!((&output[..32], &output[32..]), (&input[..32], &[0xff; 32][..]), "what nobody wrote is NaN");
    assert_eq!(cuMemcpyDtoH_v2(output.as_mut_ptr().cast(), b + 1, 64), InvalidValue, "past the end");
    assert_eq!(cuMemsetD8Async(b + 8, 7, 8, 0), Success);
    // Rows of 4 bytes, 16 apart on the device, one behind the other at the host.
    let host = |host: *mut u8| Side { x: 0, y: 0, kind: 1, host: host.cast(), device: 0, array: 0, pitch: 4 };
    let device = Side { x: 4, y: 1, kind: 2, host: null_mut(), device: a, array: 0, pitch: 16 };
    let rows = Rows { from: device, to: host(output.as_mut_ptr()), width: 4, height: 3 };
    assert_eq!(cuMemcpy2DAsync_v2(Array::of(&[rows]), 0), Success);
    assert_eq!(output[..12], [20, 21, 22, 23, 36, 37, 38, 39, 52, 53, 54, 55]);
    let rows = Rows { height: 4, ..rows };
    assert_eq!(cuMemcpy2DAsync_v2(Array::of(&[rows]), 0), InvalidValue, "past the end");
    assert_eq!((cuMemFree_v2(a), cuMemFree_v2(a), cuMemFreeAsync(b, 0)), (Success, InvalidValue, Success));
    assert_eq!(out(|out| cuMemAlloc_v2(out, 0)), (0, InvalidValue));
    assert_eq!(out(|out| cuMemAlloc_v2(out, 1 << 60)), (0, OutOfMemory));
    let mut pinned = null_mut();
    assert_eq!(cuMemAllocHost_v2(Out::to(&mut pinned), 100), Success);
    assert_eq!((cuMemFreeHost(pinned), cuMemFreeHost(pinned)), (Success, InvalidValue));
}

const STORE: &CStr = c"
.version 8.0
.target sm_90
.address_size 64
.visible .entry store(.param .u64 store_to, .param .u32 store_value)
{
    .reg .b32 %r<2>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [store_to];
    ld.param.u32 %r1, [store_value];
    cvta.to.global.u64 %rd2, %rd1;
    st.global.u32 [%rd2], %r1;
    ret;
}
";

#[test]
fn a_kernel_gets_its_parameters() {
    start();
    let module = ok(|out| cuModuleLoadData(out, Text::of(STORE)));
    assert_eq!(out(|out| cuModuleGetFunction(out, module, Text::of(c"load"))), (0, NotFound));
    let function = ok(|out| cuModuleGetFunction(out, module, Text::of(c"store")));
    let to = ok(|out| cuMemAlloc_v2(out, 4));
    let value = 12345u32;
    let (to_bytes, value_bytes) = (to.to_ne_bytes(), value.to_ne_bytes());
    let params = [Array::of(&to_bytes), Array::of(&value_bytes)];
    let launch = |grid, threads, shared| {
        cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, shared, 0, Array::of(&params), null_mut())
    };
    assert_eq!(launch(1, 1, 0), Success);
    let mut got = 0u32;
    assert_eq!(cuMemcpyDtoH_v2((&raw mut got).cast(), to, 4), Success);
    assert_eq!(got, value);
    assert_eq!((launch(0, 1, 0), launch(1, 1025, 0), launch(1, 1, 49153)), (InvalidValue, InvalidValue, InvalidValue));
    assert_eq!(cuFuncSetAttribute(function, 8, 232449), InvalidValue);
    assert_eq!((cuFuncSetAttribute(function, 8, 232448), launch(1, 1, 232448)), (Success, Success));
    assert_eq!(ok(|out| cuFuncGetAttribute(out, 8, function)), 232448);
    assert_eq!((cuModuleUnload(module), cuMemFree_v2(to)), (Success, Success));
}

#[test]
fn what_is_no_ptx_is_refused() {
    start();
    assert_eq!(out(|out| cuModuleLoadData(out, Text::of(c"\x7fELF"))), (0, InvalidImage));
    assert_eq!(out(|out| cuModuleLoadData(out, Text::of(c".version 8.0\n.visible .entry open("))), (0, InvalidPtx));
}

#[test]
fn tensor_maps_are_encoded() {
    #[repr(align(128))]
    struct Aligned([u8; 128]);
    start();
    let address = ok(|out| cuMemAlloc_v2(out, 4096));
    let mut bytes = Aligned([0; 128]);
    let mut encode = |address, swizzle| {
        let (dims, strides, boxes, element_strides) = ([64, 32], [128], [64, 8], [1, 1]);
        let (dims, strides) = (Array::of(&dims), Array::of(&strides));
        let (boxes, steps) = (Array::of(&boxes), Array::of(&element_strides));
        cuTensorMapEncodeTiled(Out::to(&mut bytes.0), 6, 2, address, dims, strides, boxes, steps, 0, swizzle, 0, 0)
    };
    assert_eq!((encode(address, 2), encode(address + 8, 3)), (InvalidValue, InvalidValue));
    assert_eq!(encode(address, 3), Success);
    assert_eq!(TensorMap::from_bytes(&bytes.0).unwrap().box_bytes(), 1024);
    assert_eq!(cuMemFree_v2(address), Success);
}
