//! Bad input is refused before anything runs, with a message that says what was expected and what came.

use burn::tensor::{Bool, DType, Device, Int, Tensor};
use flashover::kernels::select::KernelChoice;
use flashover::{AttentionError, AttentionOptions, Precision, attention};

use crate::devices;

const Q: [usize; 4] = [2, 4, 5, 8];
const K: [usize; 4] = [2, 2, 7, 8];
const V: [usize; 4] = [2, 2, 7, 6];

fn zeros(shape: [usize; 4]) -> Tensor<4> {
    Tensor::zeros(shape, &devices::flex())
}

fn refused(q: [usize; 4], k: [usize; 4], v: [usize; 4], options: &AttentionOptions) -> AttentionError {
    attention(zeros(q), zeros(k), zeros(v), options).expect_err("the call should be refused")
}

fn refused_options(options: AttentionOptions) -> String {
    refused(Q, K, V, &options).to_string()
}

#[test]
fn shapes_that_do_not_fit() {
    let plain = AttentionOptions::new();
    for (q, k, v, message) in [
        (Q, [1, 2, 7, 8], V, "batch of k (dimension 0): expected 2, got 1"),
        (Q, K, [3, 2, 7, 6], "batch of v (dimension 0): expected 2, got 3"),
        (Q, K, [2, 4, 7, 6], "heads of v (dimension 1): expected 2, got 4"),
        (Q, K, [2, 2, 9, 6], "keys of v (dimension 2): expected 7, got 9"),
        (Q, [2, 2, 7, 9], V, "head dimension of k (dimension 3): expected 8, got 9"),
        ([2, 3, 5, 8], K, V, "query heads: expected a multiple of the 2 key heads, got 3"),
        ([2, 4, 5, 257], [2, 2, 7, 257], V, "head dimension: expected 1 to 256, got 257"),
        (Q, K, [2, 2, 7, 300], "value dimension: expected 1 to 256, got 300"),
    ] {
        assert_eq!(refused(q, k, v, &plain).to_string(), message);
    }
}

/// A kernel by name is that kernel or an error, also where there are no kernels to choose from.
#[test]
fn kernels_by_name() {
    for choice in [KernelChoice::Portable, KernelChoice::Mma, KernelChoice::Cmma, KernelChoice::Hopper] {
        let message = refused_options(AttentionOptions::new().kernel(choice));
        let expected = format!("kernel: expected a CubeCL device for a kernel by name ({choice:?}), got ");
        assert!(message.starts_with(&expected), "{message}");
    }
    let Some(gpu) = devices::gpu() else {
        return devices::skip("bad_input::kernels_by_name", "this build has no GPU backend");
    };
    let q = Tensor::<4>::zeros(Q, &gpu);
    let call = |choice| attention(q.clone(), q.clone(), q.clone(), &AttentionOptions::new().kernel(choice));
    call(KernelChoice::Portable).expect("it runs everywhere");
    // In f32 none of these takes it, on any device, unless products may be rounded.
    for (choice, name) in [(KernelChoice::Mma, "mma"), (KernelChoice::Cmma, "cmma"), (KernelChoice::Hopper, "hopper")] {
        let message = call(choice).expect_err("not in f32").to_string();
        let expected = format!("kernel: the {name} kernel was asked for and cannot run: ");
        assert!(message.starts_with(&expected), "{message}");
    }
}

#[test]
fn options_that_make_no_sense() {
    let device = devices::flex();
    let o = AttentionOptions::new;
    for (options, message) in [
        (o().scale(f64::NAN), "scale: expected a finite number, got NaN"),
        (o().scale(f64::INFINITY), "scale: expected a finite number, got inf"),
        (o().softcap(-1.0), "softcap: expected a positive finite number, got -1"),
        (o().sliding_window(0), "sliding_window: expected at least 1 key (the query's own), got 0"),
        (o().dropout(1.0, 3), "dropout: expected a probability in [0, 1), got 1"),
        (o().dropout(-0.5, 3), "dropout: expected a probability in [0, 1), got -0.5"),
        (o().dropout(f64::NAN, 3), "dropout: expected a probability in [0, 1), got NaN"),
        (
            o().mask(Tensor::<4, Bool>::zeros([2, 4, 5, 6], &device)),
            "mask: expected a shape that broadcasts to [B, Hq, Sq, Skv] = [2, 4, 5, 7], got [2, 4, 5, 6]",
        ),
        (
            o().bias(zeros([2, 3, 1, 7])),
            "bias: expected a shape that broadcasts to [B, Hq, Sq, Skv] = [2, 4, 5, 7], got [2, 3, 1, 7]",
        ),
        (o().alibi_slopes(Tensor::zeros([2], &device)), "length of alibi_slopes: expected 4 (one a query head), got 2"),
        (
            o().learned_sinks(Tensor::zeros([5], &device)),
            "length of learned_sinks: expected 4 (one a query head), got 5",
        ),
        (
            o().key_lengths(Tensor::<1, Int>::zeros([3], &device)),
            "length of key_lengths: expected 2 (one a batch element), got 3",
        ),
    ] {
        assert_eq!(refused_options(options), message);
    }
}

#[test]
fn a_window_of_no_keys_is_forgiven_by_a_later_window() {
    let options = AttentionOptions::new().sliding_window(0).window(1, 1);
    assert!(attention(zeros(Q), zeros(K), zeros(V), &options).is_ok());
}

#[test]
fn dtypes_that_differ() {
    let device = devices::flex();
    let half = |shape: [usize; 4]| Tensor::<4>::zeros(shape, (&device, DType::F16));
    let plain = AttentionOptions::new();
    let error = attention(zeros(Q), half(K), zeros(V), &plain).unwrap_err();
    assert_eq!(error.to_string(), "dtype of k: expected that of q, F32, got F16");
    let rounded = plain.clone().precision(Precision::Tf32x3);
    let error = attention(half(Q), half(K), half(V), &rounded).unwrap_err();
    assert_eq!(error.to_string(), "precision Tf32x3: expected elements of type F32, got F16");
    assert!(attention(zeros(Q), zeros(K), zeros(V), &rounded).is_ok());
    let error = attention(half(Q), half(K), half(V), &plain.clone().bias(zeros([1, 1, 5, 7]))).unwrap_err();
    assert_eq!(error.to_string(), "dtype of bias: expected that of q, F16, got F32");
}

#[test]
fn devices_that_differ() {
    for (_, other) in devices::chunked() {
        let k = Tensor::zeros(K, &other);
        let error = attention(zeros(Q), k, zeros(V), &AttentionOptions::new()).unwrap_err();
        assert!(matches!(error, AttentionError::Device { what: "k", .. }), "{error}");
        let mask = Tensor::<4, Bool>::zeros([1, 1, 1, 1], &other);
        let error = attention(zeros(Q), zeros(K), zeros(V), &AttentionOptions::new().mask(mask)).unwrap_err();
        assert!(matches!(error, AttentionError::Device { what: "mask", .. }), "{error}");
    }
}

#[test]
fn f64_is_for_the_cpu() {
    let double = |shape: [usize; 4], device: &Device| Tensor::<4>::zeros(shape, (device, DType::F64));
    let flex = devices::flex();
    let plain = AttentionOptions::new();
    assert!(attention(double(Q, &flex), double(K, &flex), double(V, &flex), &plain).is_ok());
    if let Some(gpu) = devices::gpu()
        && gpu.supports_dtype(DType::F64)
    {
        let error = attention(double(Q, &gpu), double(K, &gpu), double(V, &gpu), &plain).unwrap_err();
        assert!(error.to_string().contains("f64 runs on the CPU only"), "{error}");
    }
}

#[test]
fn empty_batches_and_lengths_are_valid() {
    let plain = AttentionOptions::new();
    let mut all = vec![devices::flex()];
    all.extend(devices::chunked().into_iter().map(|(_, device)| device));
    all.extend(devices::gpu());
    for device in all {
        let zeros = |shape: [usize; 4]| Tensor::<4>::zeros(shape, &device);
        for (batch, queries, keys) in [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)] {
            let (q, k, v) = (zeros([batch, 4, queries, 8]), zeros([batch, 2, keys, 8]), zeros([batch, 2, keys, 6]));
            let (o, lse) = flashover::attention_with_lse(q, k, v, &plain).expect("empty is valid");
            assert_eq!((o.dims(), lse.dims()), ([batch, 4, queries, 6], [batch, 4, queries]));
            assert!(o.into_data().iter::<f32>().all(|x| x == 0.0));
            if keys == 0 {
                assert!(lse.into_data().iter::<f32>().all(|x| x == f32::NEG_INFINITY));
            }
        }
    }
}
