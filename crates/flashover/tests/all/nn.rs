//! The modules of `flashover::nn`: against burn-nn's, against the oracle, and against themselves.

mod against_burn;
mod autoregressive;
mod encoder;
mod masks;
mod options;
mod rotary;
mod training;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::module::Module;
use burn::store::ModuleRecord;
use burn::tensor::{Bool, Device, Tensor, TensorData};
use flashover_testing::bridge;

thread_local! {
    /// Seed of the next tensor of a test.
    static SEED: Cell<u64> = const { Cell::new(0) };
}

/// Wide enough that softmax is far from uniform.
fn normal<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    bridge::normal(SEED.replace(SEED.get() + 1), 2.0, shape, device)
}

fn assert_close<const D: usize>(name: &str, found: Tensor<D>, expected: Tensor<D>) {
    assert_eq!(found.dims(), expected.dims(), "{name}");
    let difference = (found.clone() - expected.clone()).abs().max().into_scalar::<f32>();
    let size = expected.abs().max().into_scalar::<f32>();
    assert!(difference <= 1e-5 * (1.0 + size), "{name}: off by {difference:e} at size {size}");
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// The state of `from`, written to bytes and read again, in `to`.
fn transfer<A: Module, B: Module>(from: &A, to: B) -> B {
    let bytes = from.clone().into_record().into_bytes().expect("a record that can be written");
    to.load_record(ModuleRecord::from_bytes(bytes).expect("a record that can be read"))
}

/// `[B, Skv]`: hides keys at the end, more of them in later batch elements.
fn padding(batch: usize, keys: usize, device: &Device) -> Tensor<2, Bool> {
    let hidden: Vec<bool> = (0..batch * keys).map(|n| n % keys >= keys - n / keys - 1).collect();
    Tensor::from_data(TensorData::new(hidden, [batch, keys]), device)
}

/// `[B, Sq, Skv]`: hides some of the keys, never the first.
fn holes(batch: usize, queries: usize, keys: usize, device: &Device) -> Tensor<3, Bool> {
    let hides = |n: usize| !n.is_multiple_of(keys) && (n * 7 + n / keys) % 5 < 2;
    let hidden: Vec<bool> = (0..batch * queries * keys).map(hides).collect();
    Tensor::from_data(TensorData::new(hidden, [batch, queries, keys]), device)
}

/// The message of the panic that `call` ends in.
fn panic_message<T>(call: impl FnOnce() -> T) -> String {
    let Err(payload) = catch_unwind(AssertUnwindSafe(call)) else { panic!("expected a panic") };
    match payload.downcast::<String>() {
        Ok(message) => *message,
        Err(payload) => payload.downcast::<&str>().expect("a panic with a message").to_string(),
    }
}

fn assert_panics<T>(expected: &str, call: impl FnOnce() -> T) {
    let message = panic_message(call);
    assert!(message.contains(expected), "expected {expected:?} in {message:?}");
}
