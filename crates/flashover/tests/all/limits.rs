//! The limits of the software GPU that every GPU test runs on are real: the device reports them, and refuses more.

use burn::backend::DispatchDevice;
use burn::tensor::Tensor;
use cubecl::client::Client;
use cubecl::prelude::*;
use flashover::kernels::device::DeviceLimits;
use flashover::kernels::portable::{TileConfig, check_limits};
use flashover::kernels::problem::{Element, Problem};
use flashover::{AttentionOptions, attention};
use flashover_testing::bridge::normal;
use flashover_testing::data::Case;

use crate::devices::limited::limited;
use crate::grid::check;

fn client() -> Client {
    let device = limited();
    let DispatchDevice::Cube(device) = device.as_dispatch() else { panic!("a CubeCL device") };
    device.client()
}

#[test]
fn the_device_reports_what_webgpu_grants() {
    let limits = DeviceLimits::of(&client());
    assert_eq!((limits.max_bindings, limits.max_shared_bytes, limits.max_units), (7, 16 * 1024, 256));
}

/// Sums the first elements of `inputs` with a detour through so many words of shared memory.
#[cube(launch)]
fn sum_first(inputs: &Sequence<Box<[u32]>>, output: &mut [u32], #[comptime] words: usize) {
    let mut total = 0u32;
    #[unroll]
    for i in 0..inputs.len() {
        total += inputs[i][0];
    }
    let mut shared = Shared::<[u32]>::new_slice(words);
    shared[words - 1] = total;
    sync_cube();
    output[0] = shared[words - 1];
}

/// Runs a kernel that asks for so much, through CubeCL as every kernel of ours.
fn asks_for(bindings: usize, words: usize, units: u32) -> Result<u32, String> {
    let client = client();
    let inputs: Vec<_> = (1..bindings).map(|_| client.create_from_slice(u32::as_bytes(&[1]))).collect();
    let output = client.create_from_slice(u32::as_bytes(&[0]));
    // SAFETY: each of the buffers holds one element.
    let one = |handle: &cubecl::server::Handle| unsafe { BufferArg::from_raw_parts(handle.clone(), 1) };
    let count = CubeCount::Static(1, 1, 1);
    sum_first::launch(&client, count, CubeDim::new_1d(units), inputs.iter().map(one).collect(), one(&output), words);
    match client.read_one(output) {
        Ok(data) => Ok(u32::from_bytes(&data)[0]),
        Err(error) if error.is_refusal() => Err(error.to_string()),
        Err(error) => panic!("expected a refusal, got {error}"),
    }
}

#[test]
fn the_device_refuses_more() {
    let words = 16 * 1024 / size_of::<u32>();
    assert_eq!(asks_for(7, words, 256), Ok(6), "what is granted runs");
    for (what, answer) in [
        ("bindings", asks_for(8, words, 256)),
        ("shared memory", asks_for(7, words + 1, 256)),
        ("units", asks_for(7, words, 257)),
    ] {
        let error = answer.expect_err(&format!("a kernel with too many {what} ran"));
        println!("{what}: {error}");
    }
}

#[test]
fn burns_own_kernels_run_on_it() {
    let device = &limited();
    let x = normal(3, 1.0, [130, 70], device);
    let y = (x.clone() * 2.0 + 1.0).matmul(x.clone().transpose()).sum_dim(1);
    let host = burn::tensor::Device::flex();
    let x = Tensor::<2>::from_data(x.into_data(), &host);
    let expected = (x.clone() * 2.0 + 1.0).matmul(x.transpose()).sum_dim(1);
    y.into_data().assert_approx_eq::<f32>(&expected.into_data(), burn::tensor::Tolerance::rel_abs(1e-4, 1e-2));
}

/// Counts to `count`.
#[cube(launch)]
fn count_to(output: &mut [u32], count: u32) {
    let mut i = 0u32;
    while i < count {
        // What the compiler cannot add up in advance.
        output[0] ^= i;
        i += 1;
    }
    output[1] = i;
}

#[test]
fn loops_end_when_they_should() {
    let client = client();
    let limit = DeviceLimits::of(&client).max_iterations;
    for count in [10u32, 60_000, 65_535, 70_000, 1_000_000] {
        let output = client.create_from_slice(u32::as_bytes(&[0, 0]));
        // SAFETY: the buffer holds two elements.
        let arg = unsafe { BufferArg::from_raw_parts(output.clone(), 2) };
        count_to::launch(&client, CubeCount::Static(1, 1, 1), CubeDim::new_1d(1), arg, count);
        let counted = u32::from_bytes(&client.read_one(output).unwrap())[1];
        println!("{count}: counted to {counted}");
        if count as usize <= limit {
            assert_eq!(counted, count, "the device promises {limit} iterations");
        }
    }
}

/// One query and `keys` keys.
fn decoding(keys: usize) -> Problem {
    Problem::new([1, 1, 1, 16], [1, 1, keys, 16], [1, 1, keys, 16], Element::F32).unwrap()
}

#[test]
fn the_longest_walk_that_is_admitted_is_walked_to_its_end() {
    let limits = DeviceLimits::of(&client());
    let admitted = |keys: usize| check_limits(&decoding(keys), &limits, TileConfig::SOFTWARE);
    // In steps of a tile, from a length that runs anywhere to one that takes no software GPU's loops.
    let longest = (1..4096).map(|tiles| tiles * TileConfig::SOFTWARE.cols()).take_while(|&keys| admitted(keys).is_ok());
    let longest = longest.last().expect("one tile of keys is admitted");
    println!("{longest} keys are admitted");
    check(&Case::new(decoding(longest), 7), &[limited()]).unwrap();

    let more = longest + 1;
    if admitted(more).is_err() {
        let x = |length: usize| Tensor::<4>::zeros([1, 1, length, 16], &limited());
        let error = attention(x(1), x(more), x(more), &AttentionOptions::new()).expect_err("a walk that is too long");
        assert!(error.to_string().contains("expected at most 65535 loop iterations of a unit"), "{error}");
    }
}
