//! That the grid covers what it says, and that names tell problems apart.

use std::collections::BTreeSet;

use flashover_kernels::hopper::HopperConfig;

use super::*;

/// What can be read off a case, one level each: the factors as a reader of the problems sees them.
fn facts(case: &Case) -> Vec<(&'static str, String)> {
    let p = &case.problem;
    let kind = (p.band.causal, p.band.left < UNBOUNDED, p.band.right < UNBOUNDED, p.band.sinks);
    let mut facts = vec![
        ("mask", format!("{kind:?} {} {}", p.mask.is_some(), p.key_lengths)),
        ("group", p.group().to_string()),
        ("sq", p.seq_q.to_string()),
        ("skv", p.seq_kv.to_string()),
        ("d", p.head_dim.to_string()),
        ("dv", (p.head_dim == p.value_dim).to_string()),
        ("batch", p.batch.to_string()),
        ("softcap", p.softcap.is_some().to_string()),
        ("alibi", p.alibi.to_string()),
        ("learned sinks", p.learned_sinks.to_string()),
        ("dropout", p.dropout.is_some().to_string()),
        ("dlse", case.lse_gradient.to_string()),
    ];
    facts.push(("scale", ((p.scale - 1.0 / (p.head_dim as f64).sqrt()).abs() < 1e-9).to_string()));
    facts.push(("bias", p.bias.is_some().to_string()));
    facts
}

#[test]
fn every_pair_of_levels_occurs() {
    for max_len in [65, 211, 1023] {
        let mut levels = LEVELS;
        let lengths = LENGTHS.iter().filter(|&&length| length <= max_len).count();
        (levels[2], levels[3]) = (lengths, lengths);
        let rows = covering_array(&levels);
        for (x, y) in (0..FACTORS).flat_map(|x| (x + 1..FACTORS).map(move |y| (x, y))) {
            let found: BTreeSet<_> = rows.iter().map(|row| (row[x], row[y])).collect();
            assert_eq!(found.len(), levels[x] * levels[y], "factors {x} and {y} at lengths up to {max_len}");
        }
        assert!(rows.iter().flat_map(|row| row.iter().zip(&levels)).all(|(level, levels)| level < levels));
        assert!(rows.len() <= 2 * 80, "{} rows, at least 80 are needed", rows.len());
    }
}

#[test]
fn every_pair_of_facts_occurs_in_the_problems() {
    let cases = all_pairs_cases(Element::F32, 1023);
    let rows: Vec<_> = cases.iter().map(facts).collect();
    let factors = rows[0].len();
    let levels = |factor: usize| rows.iter().map(|row| &row[factor].1).collect::<BTreeSet<_>>();
    let counts: Vec<usize> = (0..factors).map(|factor| levels(factor).len()).collect();
    assert_eq!(counts, [8, 3, 8, 8, 10, 2, 2, 2, 2, 2, 2, 2, 2, 2]);
    for (x, y) in (0..factors).flat_map(|x| (x + 1..factors).map(move |y| (x, y))) {
        let found: BTreeSet<_> = rows.iter().map(|row| (&row[x].1, &row[y].1)).collect();
        assert_eq!(found.len(), counts[x] * counts[y], "{} and {}", rows[0][x].0, rows[0][y].0);
    }
    assert_eq!(all_pairs(Element::F32, 1023), cases.into_iter().map(|case| case.problem).collect::<Vec<_>>());
}

#[test]
fn max_len_bounds_the_lengths() {
    let problems = all_pairs(Element::F16, 113);
    assert!(problems.iter().all(|p| p.seq_q <= 113 && p.seq_kv <= 113 && p.element == Element::F16));
    assert!(problems.iter().any(|p| p.seq_q == 113 && p.seq_kv == 113));
}

#[test]
fn the_full_grid_is_a_product_and_uses_every_option() {
    let cases = full_cases(Element::BF16);
    assert_eq!(cases.len(), 5760);
    let mut product = BTreeSet::new();
    for case in &cases {
        let [mask, group, sq, skv, d, ..] = &facts(case)[..] else { unreachable!() };
        product.insert([mask, group, sq, skv, d].map(|(_, level)| level.clone()));
        assert!(case.problem.batch <= 2 && case.problem.heads_q <= 4);
    }
    assert_eq!(product.len(), 5760);
    for length in LENGTHS {
        let kinds: BTreeSet<_> = cases
            .iter()
            .filter(|case| case.problem.seq_q == length || case.problem.seq_kv == length)
            .map(|case| case.problem.seq_q.cmp(&case.problem.seq_kv))
            .collect();
        assert_eq!(kinds.len(), 3, "equal, fewer and more queries at {length}");
    }
    for kind in cases.chunks(720) {
        for fact in 5..14 {
            let levels: BTreeSet<_> = kind.iter().map(|case| facts(case)[fact].1.clone()).collect();
            assert_eq!(levels.len(), 2, "{}", facts(&kind[0])[fact].0);
        }
        let plain = kind.iter().filter(|case| {
            let p = &case.problem;
            p.bias.is_none() && p.softcap.is_none() && !p.alibi && !p.learned_sinks && p.dropout.is_none()
        });
        assert!(plain.count() > 50, "plain problems of every mask kind");
        let biases: BTreeSet<_> = kind.iter().filter_map(|case| case.problem.bias).collect();
        assert!(biases.len() > BIASES.len());
    }
    assert_eq!(full(Element::BF16)[17], cases[17].problem);
}

/// Those that the Hopper forward takes, and whose heads it packs: in each number, in the full grid with every option.
#[test]
fn heads_share_tiles_of_the_hopper_forward() {
    let taken = |p: &Problem| p.head_dim.is_multiple_of(8) && p.value_dim.is_multiple_of(8) && p.seq_kv >= 16;
    for (problems, each) in [(all_pairs(Element::BF16, 1023), 0), (full(Element::BF16), 1)] {
        for heads in [2, 4] {
            let packed = |p: &&Problem| taken(p) && HopperConfig::of(p).0.packed == heads;
            let packed: Vec<&Problem> = problems.iter().filter(packed).collect();
            let uses: [fn(&Problem) -> bool; 9] = [
                |p| p.band.causal,
                |p| p.band.sinks > 0,
                |p| p.softcap.is_some(),
                |p| p.alibi,
                |p| p.bias.is_some(),
                |p| p.mask.is_some(),
                |p| p.key_lengths,
                |p| p.learned_sinks,
                |p| p.dropout.is_some(),
            ];
            let counts = uses.map(|uses| packed.iter().filter(|p| uses(p)).count());
            assert!(packed.len() >= 3 && counts.iter().all(|&count| count >= each), "{heads}: {counts:?}");
        }
    }
}

#[test]
fn names_spell_the_problem() {
    let plain = |seq_q, seq_kv, value_dim| {
        Problem::new([1, 8, seq_q, 64], [1, 8, seq_kv, 64], [1, 8, seq_kv, value_dim], Element::F32).unwrap()
    };
    let square = plain(4096, 4096, 64);
    assert_eq!(case_name(&square), "full_b1_hq8_hkv8_s4096_d64_f32");
    assert_eq!(case_name(&Problem { band: Band::causal(), ..square.clone() }), "causal_b1_hq8_hkv8_s4096_d64_f32");
    let sliding = Band { causal: true, left: 1023, right: 0, sinks: 4 };
    assert_eq!(case_name(&Problem { band: sliding, ..square.clone() }), "window1024_b1_hq8_hkv8_s4096_d64_f32_sinks4");
    let everything = Problem {
        scale: 1.0,
        softcap: Some(1.0),
        alibi: true,
        bias: Some([1, 8, 63, 211]),
        mask: Some([1, 8, 63, 211]),
        key_lengths: true,
        learned_sinks: true,
        dropout: Some(Dropout { probability: 0.1, seed: 0 }),
        band: Band { left: 5, ..Band::default() },
        ..plain(63, 211, 32)
    };
    assert_eq!(
        case_name(&everything),
        "window_l5_rall_b1_hq8_hkv8_sq63_skv211_d64_dv32_f32_scale_softcap_alibi_bias_mask_lengths_learned_dropout"
    );
    let broadcast = Problem { bias: Some([1, 8, 1, 4096]), mask: Some([1; 4]), ..square };
    assert_eq!(case_name(&broadcast), "full_b1_hq8_hkv8_s4096_d64_f32_bias_hk_mask_1");
}

#[test]
fn names_tell_the_cases_of_the_grid_apart() {
    for cases in [full_cases(Element::F32), all_pairs_cases(Element::F32, 1023)] {
        let mut seen = std::collections::BTreeMap::new();
        for case in &cases {
            if let Some(other) = seen.insert(case.name(), case) {
                panic!("{}: {other:?} and {case:?}", case.name());
            }
        }
    }
}
