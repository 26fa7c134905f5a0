//! A thousand random problems a kernel family, asked for by name: shapes, options, strides and seeds are random. Each runs
//! twice: the first run is held against the f64 oracle, the second must give the same bits.
//!
//! All thousand run with `FLASHOVER_RANDOM=full`, a part of them with `FLASHOVER_RANDOM=full:K/N` (problems K, K+N, …); else
//! as many as the machine of a CI run takes in a minute or two. With N = 10 the matrix kernels of a part have one head dimension and
//! one element type, so that few are compiled: each takes the compiler seconds.

use burn::tensor::{DType, Device};
use flashover::kernels::problem::{Element, Precision};
use flashover::kernels::select::KernelChoice;
use flashover_testing::strategy::{Sizes, numbered, part};

use crate::devices;
use crate::grid::{Call, check_call};

/// Problems of a family.
const COUNT: usize = 1000;

/// What a family's problems are like.
struct Family {
    kernel: KernelChoice,
    /// Of products of f32.
    precision: Precision,
    /// In turns.
    elements: Vec<Element>,
    sizes: fn(usize) -> Sizes,
}

/// Any dimensions: where they are run-time numbers.
fn any_dims(_: usize) -> Sizes {
    Sizes::default()
}

/// Dimensions of q, k and of v, which the matrix kernels are compiled for: native, padded, unequal, not multiples of 8, large.
#[cfg(feature = "cuda")]
const DIMS: [(usize, usize); 5] = [(64, 64), (128, 128), (40, 72), (59, 111), (192, 128)];

/// At least three tiles of 128 a side in every other problem; dimensions in turns.
#[cfg(feature = "cuda")]
fn matrix_sizes(n: usize) -> Sizes {
    Sizes { longest: 400, long: 384, dims: Some(DIMS[n % DIMS.len()]), few_queries: false }
}

/// The same with dimensions that are multiples of 8.
#[cfg(feature = "cuda")]
fn hopper_sizes(n: usize) -> Sizes {
    let sizes = matrix_sizes(n);
    Sizes { dims: sizes.dims.map(|(d, dv)| (d.next_multiple_of(8), dv.next_multiple_of(8))), ..sizes }
}

/// The same with few queries, whose heads share tiles.
#[cfg(feature = "cuda")]
fn few_queries(n: usize) -> Sizes {
    Sizes { few_queries: true, ..hopper_sizes(n) }
}

/// Every problem that is a multiple of `step` runs unless told; one without a factor in common with 10 meets every dimension.
fn agree(family: &Family, step: usize, device: &Device) {
    let (part, parts) = part("FLASHOVER_RANDOM").unwrap_or((0, step));
    let (mut failures, mut count) = (Vec::new(), 0);
    for n in (part..COUNT).step_by(parts) {
        let element = family.elements[n / 5 % family.elements.len()];
        let (case, layouts) = numbered(n, element, (family.sizes)(n));
        let call = Call { kernel: family.kernel, precision: family.precision, layouts, twice: true };
        if let Err(message) = check_call(&case, call, std::slice::from_ref(device)) {
            failures.push(format!("problem {n}, {layouts:?}, seed {}: {message}", case.seed));
        }
        count += 1;
    }
    let shown = failures.iter().take(5).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} of {count} random problems failed, the first:\n{shown}", failures.len());
    println!("{count} random problems agree by {:?} at precision {:?} on {device:?}", family.kernel, family.precision);
}

#[test]
fn flex() {
    let elements = vec![Element::F32, Element::BF16, Element::F64, Element::F16];
    agree(
        &Family { kernel: KernelChoice::Auto, precision: Precision::Exact, elements, sizes: any_dims },
        5,
        &devices::flex(),
    );
}

#[test]
fn portable() {
    let Some(device) = devices::gpu() else {
        return devices::skip("random::portable", "this build has no GPU backend");
    };
    let of = [(Element::F32, DType::F32), (Element::F16, DType::F16), (Element::BF16, DType::BF16)];
    let elements = of.into_iter().filter(|(_, dtype)| device.supports_dtype(*dtype)).map(|(element, _)| element);
    let (kernel, precision) = (KernelChoice::Portable, Precision::Exact);
    let family = Family { kernel, precision, elements: elements.collect(), sizes: any_dims };
    agree(&family, 27, &device);
}

#[cfg(feature = "cuda")]
#[test]
fn mma() {
    let (precision, elements) = (Precision::Exact, vec![Element::BF16, Element::F16]);
    let family = Family { kernel: KernelChoice::Mma, precision, elements, sizes: matrix_sizes };
    agree(&family, 9, &devices::gpu().expect("a CUDA build has one"));
}

#[cfg(feature = "cuda")]
#[test]
fn tf32x3() {
    let (precision, elements) = (Precision::Tf32x3, vec![Element::F32]);
    let family = Family { kernel: KernelChoice::Mma, precision, elements, sizes: matrix_sizes };
    agree(&family, 9, &devices::gpu().expect("a CUDA build has one"));
}

#[cfg(feature = "cuda")]
#[test]
fn cmma() {
    let elements = vec![Element::BF16, Element::F16];
    let family = Family { kernel: KernelChoice::Cmma, precision: Precision::Exact, elements, sizes: matrix_sizes };
    agree(&family, 9, &devices::gpu().expect("a CUDA build has one"));
}

#[cfg(feature = "cuda")]
#[test]
fn hopper() {
    let (precision, elements) = (Precision::Exact, vec![Element::BF16, Element::F16]);
    let family = Family { kernel: KernelChoice::Hopper, precision, elements, sizes: hopper_sizes };
    agree(&family, 9, &devices::gpu().expect("a CUDA build has one"));
}

#[cfg(feature = "cuda")]
#[test]
fn hopper_few_queries() {
    let elements = vec![Element::BF16, Element::F16];
    let family = Family { kernel: KernelChoice::Hopper, precision: Precision::Exact, elements, sizes: few_queries };
    agree(&family, 27, &devices::gpu().expect("a CUDA build has one"));
}
