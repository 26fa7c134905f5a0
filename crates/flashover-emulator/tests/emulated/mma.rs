//! The family for NVIDIA's tensor cores from sm80 on, with elements of 16 bits.

use crate::attention::{Call, Family, ran};
use crate::{not_finite, suite};

fn call() -> Call {
    Call::by(Family::Mma)
}

suite::every_family!(call());

#[test]
fn each_option_agrees() {
    let launches = suite::each_option(call());
    assert!(ran(&launches, "backward_mma") && !ran(&launches, "backward_queries_mma"));
}

#[test]
fn each_option_agrees_in_two_passes() {
    let launches = suite::each_option(call().in_two_passes());
    assert!(ran(&launches, "backward_queries_mma") && ran(&launches, "backward_keys_mma"));
    assert!(!ran(&launches, "backward_mma"));
}

#[test]
fn other_dimensions_agree() {
    let launches = suite::dimensions([[128, 128], [40, 72], [59, 111]], call());
    assert!(ran(&launches, "backward_mma") && !ran(&launches, "backward_queries_mma"));
    // Of such heads there is no backward in one pass.
    let launches = suite::dimensions([[256, 192]], call());
    assert!(ran(&launches, "backward_queries_mma") && !ran(&launches, "backward_mma"));
}

#[test]
fn score_functions_agree() {
    assert!(ran(&suite::score_functions(call()), "backward_mma"));
}

#[test]
fn plans_agree_by_listed_steps() {
    let launches = suite::plans([128, 128], call());
    assert!(launches.iter().any(|launch| launch.kernel == "list_steps"));
    assert!(ran(&launches, "backward_mma"));
}

#[test]
fn plans_of_small_tiles_agree_in_two_passes() {
    let launches = suite::plans([64, 64], call().in_two_passes());
    assert!(ran(&launches, "backward_keys_mma"));
}

#[test]
fn gradients_are_taken_alone() {
    suite::gradients_alone(call());
}

#[test]
fn nan_spreads_as_the_oracle_says() {
    not_finite::spread_as_the_oracle_says(call());
    not_finite::spread_as_the_oracle_says(call().in_two_passes());
}
