//! Random problems with random options: every pair of options meets at several tiles a side.

use flashover::kernels::problem::Element;
use flashover_testing::strategy::{PairCoverage, cases};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, TestRunner};

use crate::devices;
use crate::grid::check;

/// Tiles a side that a case must span to count, and the largest tile of the native path.
const SPAN: (usize, usize) = (3, 64);

#[test]
fn random_problems_agree_with_the_oracle_on_flex() {
    let device = devices::flex();
    let mut runner = TestRunner::new_with_rng(
        Config::default(),
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let mut coverage = PairCoverage::new(SPAN.0, SPAN.1);
    for element in [Element::F32, Element::BF16, Element::F64] {
        for _ in 0..150 {
            let case = cases(element).new_tree(&mut runner).expect("a case").current();
            coverage.record(&case);
            if let Err(message) = check(&case, std::slice::from_ref(&device)) {
                panic!("{message}\n{case:?}");
            }
        }
    }
    coverage.assert_complete();
}
