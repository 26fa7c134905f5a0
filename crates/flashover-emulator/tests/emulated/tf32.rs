//! The family for NVIDIA's tensor cores with elements of f32, a product being three of tf32.

use crate::attention::{Call, Family, ran};
use crate::{not_finite, suite};

fn call() -> Call {
    Call::by(Family::Tf32)
}

suite::every_family!(call());

#[test]
fn each_option_agrees() {
    let launches = suite::each_option(call());
    assert!(ran(&launches, "backward_queries_mma") && ran(&launches, "backward_keys_mma"));
}

#[test]
fn other_dimensions_agree() {
    suite::dimensions([[128, 128], [59, 111]], call());
}

#[test]
fn score_functions_agree() {
    suite::score_functions(call());
}

#[test]
fn plans_agree() {
    suite::plans([64, 64], call());
}

#[test]
fn nan_spreads_as_the_oracle_says() {
    not_finite::spread_as_the_oracle_says(call());
}

#[test]
fn infinities_are_kept() {
    not_finite::infinities_are_kept(call());
}
