//! The family for Hopper GPUs.

use flashover_kernels::hopper::HopperConfig;
use flashover_kernels::launch_log::Launch;
use flashover_kernels::problem::Problem;
use flashover_testing::data::Case;

use crate::attention::{Call, Family, ran};
use crate::check::{agree, sparse_agree};
use crate::problems::{DIMS, of_dims, plain};
use crate::suite::planned;
use crate::{not_finite, suite};

fn call() -> Call {
    Call::by(Family::Hopper)
}

suite::every_family!(call());

/// What a kernel's launches were configured as.
fn configs<'a>(launches: &'a [Launch], kernel: &str) -> Vec<&'a str> {
    launches.iter().filter(|launch| launch.kernel == kernel).map(|launch| launch.config.as_str()).collect()
}

#[test]
fn each_option_agrees() {
    let launches = suite::each_option(call());
    assert!(ran(&launches, "backward_hopper"));
    assert!(!ran(&launches, "backward_mma") && !ran(&launches, "backward_queries_mma"));
    let forwards = configs(&launches, "forward_hopper");
    assert!(forwards.iter().all(|config| !config.contains("heads of")), "{forwards:?}");
}

#[test]
fn other_dimensions_agree() {
    assert!(ran(&suite::dimensions([[128, 128], [40, 72]], call()), "backward_hopper"));
}

#[test]
fn large_heads_agree() {
    let launches = suite::dimensions([[256, 192]], call());
    // The form in which one warpgroup has dk, the other dv.
    let configs = configs(&launches, "backward_hopper");
    assert!(configs == ["tile 64x64, 2 warpgroups, head 256, values 192"], "{configs:?}");
}

#[test]
fn heads_share_tiles_where_queries_are_few() {
    let element = call().family.elements()[0];
    let of = |heads_q, seq_q| plain([2, heads_q, 2], [seq_q, 150], DIMS, element);
    let cases = [
        // Six heads, which do not fill a tile, and four. Of the six a thread's two rows are of two.
        Case::new(of(12, 5), 90),
        Case::new(Problem { alibi: true, ..of(12, 5) }, 93),
        Case::new(Problem { alibi: true, key_lengths: true, ..of(8, 30) }, 91),
    ];
    let launches = agree(cases, Call { twice: true, ..call() });
    let configs = configs(&launches, "forward_hopper");
    assert!(configs.iter().all(|config| config.contains("heads of")), "{configs:?}");
}

/// As where walks are long, which here would take minutes.
#[test]
fn three_warpgroups_agree() {
    let case = Case::new(plain([1, 2, 1], [400, 300], DIMS, call().family.elements()[0]), 92);
    let launches = agree(
        [case],
        Call {
            choose: |selection| {
                let tiles = selection.hopper.expect("the family's tiles");
                selection.hopper = Some(HopperConfig { consumers: 3, bk: 112, packed: 1, ..tiles });
            },
            twice: true,
            ..call()
        },
    );
    let configs = configs(&launches, "forward_hopper");
    assert!(configs.iter().all(|config| config.contains("3 warpgroups")), "{configs:?}");
}

#[test]
fn unordered_gradients_agree() {
    let [element, other] = call().family.elements();
    let unordered = |problem| Problem { unordered: true, ..problem };
    let cases = [of_dims(DIMS, element), of_dims([256, 192], other)];
    let mut launches = agree(cases.map(|case| Case { problem: unordered(case.problem), ..case }), call());
    let listed = unordered(plain([1, 2, 1], [300, 410], DIMS, element));
    launches.extend(sparse_agree([planned(listed, 93, [128, 128])], call()));
    let configs = configs(&launches, "backward_hopper");
    assert!(configs.len() == 3 && configs.iter().all(|config| config.ends_with("unordered")), "{configs:?}");
    assert!(configs[2].contains("listed"), "{configs:?}");
}

/// Sections of heads of which the last is smaller, more works than cubes, and a dimension whose query tiles are half a plan's.
#[test]
fn backwards_in_sections_agree() {
    let element = call().family.elements()[0];
    // Two key tiles a head on four multiprocessors: two heads side by side; under a plan in order four.
    let short = plain([1, 5, 5], [230, 190], DIMS, element);
    let grouped = plain([1, 6, 3], [70, 500], [128, 128], element);
    // One step a key tile, so that the next one's values are copied at once.
    let large = plain([1, 2, 2], [60, 330], [192, 136], element);
    let cases = [Case::new(short.clone(), 94), Case::new(grouped, 95), Case::new(large, 98)];
    let launches = agree(cases, Call { twice: true, ..call() });
    assert!(ran(&launches, "backward_hopper"));
    let wide = plain([1, 5, 5], [400, 390], [128, 128], element);
    let listed = [planned(short, 96, [128, 128]), planned(wide, 97, [128, 128])];
    let launches = sparse_agree(listed, Call { twice: true, ..call() });
    let configs = configs(&launches, "backward_hopper");
    assert!(configs.iter().all(|config| config.ends_with("listed")), "{configs:?}");
}

#[test]
fn the_backward_of_mma_agrees() {
    let case = of_dims(DIMS, call().family.elements()[0]);
    let launches = agree([case], call().in_two_passes());
    assert!(ran(&launches, "forward_hopper") && ran(&launches, "backward_keys_mma"));
}

#[test]
fn score_functions_agree() {
    assert!(ran(&suite::score_functions(call()), "backward_hopper"));
}

#[test]
fn plans_agree_by_listed_steps() {
    let launches = suite::plans([128, 128], call());
    let configs = configs(&launches, "backward_hopper");
    assert!(ran(&launches, "list_steps") && configs.iter().all(|config| config.ends_with("listed")), "{configs:?}");
}

#[test]
fn nan_spreads_as_the_oracle_says() {
    not_finite::spread_as_the_oracle_says(call());
}
