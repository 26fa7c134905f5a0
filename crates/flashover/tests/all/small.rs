//! A handful of small problems, each option by itself or with few others, at several tiles a side, on everything that
//! runs kernels of ours: in seconds, even on a software GPU, much of what the whole grid would find.

use burn::tensor::{DType, Device};
use flashover::kernels::dropout::Dropout;
use flashover::kernels::mask::{Band, UNBOUNDED};
use flashover::kernels::problem::{Element, Problem};
use flashover_testing::data::Case;

use crate::devices;
use crate::grid::check;

fn problems(element: Element) -> Vec<Problem> {
    let shape = |heads, seq, width| [2, heads, seq, width];
    let plain = || Problem::new(shape(4, 70, 16), shape(2, 132, 16), shape(2, 132, 24), element).expect("sound");
    vec![
        plain(),
        Problem { band: Band { causal: true, left: 60, right: UNBOUNDED, sinks: 2 }, ..plain() },
        Problem { softcap: Some(2.0), learned_sinks: true, ..plain() },
        Problem { alibi: true, key_lengths: true, ..plain() },
        Problem { bias: Some([1, 4, 1, 132]), mask: Some([2, 1, 70, 132]), ..plain() },
        Problem { dropout: Some(Dropout { probability: 0.3, seed: 5 }), band: Band::causal(), ..plain() },
        // Scores so far apart that the running maximum of many rows grows from tile to tile.
        Problem { scale: 4.0, ..plain() },
    ]
}

fn agree(element: Element, devices: &[Device]) {
    let cases = problems(element).into_iter().zip(0..).map(|(problem, seed)| Case::new(problem, seed));
    let failures: Vec<String> = cases.filter_map(|case| check(&case, devices).err()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn each_option_agrees_with_the_oracle_in_f32() {
    agree(Element::F32, &devices::native());
}

#[test]
fn each_option_agrees_with_the_oracle_in_f16() {
    let devices = devices::native();
    let able: Vec<Device> = devices.iter().filter(|device| device.supports_dtype(DType::F16)).cloned().collect();
    if able.len() < devices.len() {
        devices::skip("small::each_option_agrees_with_the_oracle_in_f16", "the GPU has no such dtype");
    }
    agree(Element::F16, &able);
}
