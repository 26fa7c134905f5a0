//! `flashover::module::attention` takes the place of `burn::tensor::module::attention`.

use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, Tensor, Tolerance};
use flashover_testing::bridge;

use crate::devices;

#[test]
fn same_signature_same_values() {
    let device = devices::flex();
    let normal = |seed, shape: [usize; 4]| bridge::normal(seed, 1.0, shape, &device);
    let (q, k, v) = (normal(3, [2, 3, 33, 16]), normal(4, [2, 3, 70, 16]), normal(5, [2, 3, 70, 16]));
    let mask = Tensor::<4, Bool>::from_data(normal(6, [2, 3, 33, 70]).greater_elem(1.0).into_data(), &device);
    let bias = normal(7, [2, 3, 33, 70]);
    for options in [
        AttentionModuleOptions::default(),
        AttentionModuleOptions { is_causal: true, ..Default::default() },
        AttentionModuleOptions { scale: Some(0.3), softcap: Some(2.0), is_causal: false },
    ] {
        for (mask, bias) in [(None, None), (Some(mask.clone()), None), (Some(mask.clone()), Some(bias.clone()))] {
            let call = |f: fn(_, _, _, _, _, _) -> Tensor<4>| {
                f(q.clone(), k.clone(), v.clone(), mask.clone(), bias.clone(), options).into_data()
            };
            let (ours, burns) = (call(flashover::module::attention), call(burn::tensor::module::attention));
            ours.assert_approx_eq::<f32>(&burns, Tolerance::absolute(2e-5));
        }
    }
}

#[test]
#[should_panic(expected = "batch of k (dimension 0): expected 2, got 1")]
fn panics_as_burn_does() {
    let device = devices::flex();
    let zeros = |batch: usize| Tensor::<4>::zeros([batch, 1, 4, 4], &device);
    flashover::module::attention(zeros(2), zeros(1), zeros(2), None, None, AttentionModuleOptions::default());
}
