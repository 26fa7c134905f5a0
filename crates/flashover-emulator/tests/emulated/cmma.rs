//! The family for cooperative matrices.

use crate::attention::{Call, Family, ran};
use crate::{not_finite, suite};

fn call() -> Call {
    Call::by(Family::Cmma)
}

suite::every_family!(call());

#[test]
fn each_option_agrees() {
    let launches = suite::each_option(call());
    assert!(ran(&launches, "backward_queries_cmma") && ran(&launches, "backward_keys_cmma"));
}

#[test]
fn other_dimensions_agree() {
    suite::dimensions([[128, 128], [59, 111], [256, 192]], call());
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
fn gradients_are_taken_alone() {
    suite::gradients_alone(call());
}

#[test]
fn nan_spreads_as_the_oracle_says() {
    not_finite::spread_as_the_oracle_says(call());
}
