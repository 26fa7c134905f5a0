//! Traffic derived from the programs against the paper's closed forms, typed in by hand, in elements and exactly.
//!
//! A collective over a group of one chip moves nothing, so each term of a formula stands behind the size of its group.

use flashover_shard::architecture::{Architecture, Block, Mlp, Nonlinearity, Norm};
use flashover_shard::count::Counter;
use flashover_shard::layout::{AttentionLayout, Layout, LayoutOptions, WeightLayout};
use flashover_shard::mesh::Mesh;
use flashover_shard::models;
use flashover_shard::precision::{Precision, WeightType};
use flashover_shard::program::{Part, Program};
use flashover_shard::spec::Sizes;
use flashover_shard::workload::Workload;
use proptest::prelude::*;

const TWO: Mlp = Mlp::TwoMatrix(Nonlinearity::Gelu);
const GATED: Mlp = Mlp::Gated(Nonlinearity::Silu);

/// Elements that one block moves: as the paper counts them, and as they are sent.
#[derive(Debug, PartialEq, Clone, Copy, Default)]
struct Elements {
    payload: u64,
    sent: u64,
}

fn moved(program: &Program, mesh: &Mesh, sizes: &Sizes, of: impl Fn(Part) -> bool) -> Elements {
    let mut sum = Elements::default();
    let block = Program { embed: vec![], head: vec![], ..program.clone() };
    let counter = Counter::new(&block, mesh, 1);
    counter
        .steps(sizes, &Precision::new(WeightType::Bf16), |count| {
            if let Some(moved) = count.moved.filter(|_| of(count.part)) {
                sum.payload += count.times * moved.payload_elements;
                sum.sent += count.times * moved.sent_elements;
            }
        })
        .unwrap();
    sum
}

/// A term of a closed form: payload elements over a group of so many chips.
fn term(elements: u64, group: u64) -> Elements {
    if group == 1 {
        return Elements::default();
    }
    assert_eq!(elements % group, 0, "{elements} elements over {group} chips");
    Elements { payload: elements, sent: elements / group * (group - 1) }
}

fn sum(terms: &[Elements]) -> Elements {
    let payload = terms.iter().map(|t| t.payload).sum();
    Elements { payload, sent: terms.iter().map(|t| t.sent).sum() }
}

/// Random sizes, each a multiple of what any layout on the mesh divides it by.
#[derive(Debug, Clone)]
struct Case {
    mesh: [u64; 3],
    b: u64,
    l: u64,
    e: u64,
    f: u64,
    groups: u64,
    q: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let axis = || prop::sample::select(vec![1_u64, 2, 3, 4, 5, 8]);
    let small = || 1_u64..6;
    ([axis(), axis(), axis()], small(), small(), small(), small(), small(), small()).prop_map(
        |(mesh, b, l, e, f, groups, q)| {
            let n: u64 = mesh.iter().product();
            Case { mesh, b: b * n, l, e: e * n, f: f * n, groups, q: 2 * q }
        },
    )
}

impl Case {
    fn mesh(&self) -> Mesh {
        Mesh::torus(self.mesh[0] as usize, self.mesh[1] as usize, self.mesh[2] as usize).unwrap()
    }

    fn model(&self, heads: u64, kv_heads: u64, mlp: Mlp, block: Block) -> Architecture {
        Architecture {
            name: "random".into(),
            layers: 1,
            model_dim: self.e as usize,
            ff_dim: self.f as usize,
            heads: heads as usize,
            kv_heads: kv_heads as usize,
            head_dim: self.q as usize,
            vocabulary: 7,
            mlp,
            block,
            norm: Norm::Rms,
            rotary: true,
            tied_embeddings: true,
        }
    }

    fn moved(&self, layout: Layout, model: &Architecture, fused: bool, of: impl Fn(Part) -> bool) -> Elements {
        let options = LayoutOptions { fused, ..LayoutOptions::default() };
        let workload = Workload::prefill(self.b as usize, self.l as usize);
        let (program, sizes) = layout.program(model, &self.mesh(), &workload, options).unwrap();
        moved(&program, &self.mesh(), &sizes, of)
    }
}

/// A.2, and the table of feed-forward layouts: `m` matrices, of which `m − 1` come before the nonlinearity.
fn feed_forward(case: &Case, weights: WeightLayout, m: u64) -> Elements {
    let Case { mesh: [x, y, z], b, l, e, f, .. } = *case;
    let (n, bl) = (x * y * z, b * l);
    let gathered = |over: u64| {
        let activations = term(bl * e / over, n / over);
        sum(&[term(m * e * f * over / n, over), activations, activations])
    };
    match weights {
        // 2BLE
        WeightLayout::Stationary1D => sum(&[term(bl * e, n), term(bl * e, n)]),
        // 2BL(E/X + F/(YZ)); with a gate 2BLE/X + 3BLF/(YZ)
        WeightLayout::Stationary2D => {
            let outer = term(bl * e / x, y * z);
            sum(&[outer, term((m - 1) * bl * f / (y * z), x), term(bl * f / (y * z), x), outer])
        }
        // mEF·N/n + 2BLE/N
        WeightLayout::GatheredX => gathered(x),
        WeightLayout::GatheredXY => gathered(x * y),
        WeightLayout::GatheredXYZ => gathered(n),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// A.2: the feed-forward layer under every layout, payload as the paper takes it and (K−1)/K of it.
    #[test]
    fn feed_forward_traffic_is_the_closed_form(case in case(), fused: bool) {
        for weights in WeightLayout::ALL {
            for (mlp, m) in [(TWO, 2), (GATED, 3)] {
                let model = case.model(1, 1, mlp, Block::Serial);
                let layout = Layout { weights, attention: AttentionLayout::Heads };
                let found = case.moved(layout, &model, fused, |part| part == Part::Mlp);
                prop_assert_eq!(found, feed_forward(&case, weights, m), "{} with {} matrices", layout, m);
            }
        }
    }

    /// §3.3, §3.4: a whole parallel block of multiquery attention, 2D weight-stationary, sharded over the batch. What the
    /// closed form of the reference leaves out is typed in too: two all-to-alls, the one key head, the norm's statistics.
    #[test]
    fn a_parallel_block_is_its_closed_form(case in case(), fused: bool) {
        let Case { mesh: [x, y, z], b, l, e, f, groups, q } = case;
        let (n, bl, hq) = (x * y * z, b * l, groups * y * z * q);
        let model = case.model(groups * y * z, 1, GATED, Block::Parallel);
        // One head is not multiquery.
        prop_assume!(model.heads > 1);
        let layout = Layout { weights: WeightLayout::Stationary2D, attention: AttentionLayout::Batch };
        let statistics = Elements {
            payload: if x > 1 { 2 * bl } else { 0 },
            sent: if x > 1 { 2 * (x - 1) * bl.div_ceil(x) } else { 0 },
        };
        let outer = term(bl * e / x, y * z);
        let exchange = term(bl * hq / n, y * z);
        let expected = sum(&[
            outer,
            term(bl * (2 * f + hq) / (y * z), x),
            term(bl * (f + hq) / (y * z), x),
            outer,
            exchange,
            exchange,
            term(bl * q, n),
            term(bl * q, n),
            statistics,
        ]);
        prop_assert_eq!(case.moved(layout, &model, fused, |_| true), expected);
    }

    /// §3.4: the serial block pays one all-gather and one reduce-scatter of `BLE/X` more, and its norm twice.
    #[test]
    fn the_parallel_block_removes_one_all_reduce(case in case(), kv in 0_usize..3) {
        let [x, y, z] = case.mesh;
        let heads = case.groups * x * y * z * 2;
        let kv_heads = [1, 2, heads][kv];
        for weights in [WeightLayout::Stationary1D, WeightLayout::Stationary2D] {
            for attention in AttentionLayout::ALL {
                let layout = Layout { weights, attention };
                let traffic = |block| {
                    let case = Case { l: case.l * x * y * z, ..case.clone() };
                    case.moved(layout, &case.model(heads, kv_heads, GATED, block), true, |part| part != Part::Norm)
                };
                let (e_over, f_over) = if weights == WeightLayout::Stationary1D { (1, x * y * z) } else { (x, y * z) };
                let one = term(case.b * case.l * x * y * z * case.e / e_over, f_over);
                prop_assert_eq!(traffic(Block::Serial), sum(&[traffic(Block::Parallel), one, one]), "{}", layout);
            }
        }
    }

    /// Ring attention sends every block of keys and values once around, less one hop.
    #[test]
    fn a_ring_sends_keys_and_values_around(case in case()) {
        let [x, y, z] = case.mesh;
        let n = x * y * z;
        let case = Case { l: case.l * n, ..case };
        let layout = Layout { weights: WeightLayout::GatheredXYZ, attention: AttentionLayout::Sequence };
        let model = case.model(2 * n, 1, GATED, Block::Serial);
        let found = case.moved(layout, &model, true, |part| part == Part::Attention);
        let block = case.b * case.l / n * case.q;
        let ring = (n - 1) * 2 * block;
        // W_Q, W_O over all chips; W_K, W_V over all chips.
        let weights = |columns: u64| term(case.e * columns * case.q, n);
        let gathers = sum(&[weights(2 * n), weights(2 * n), weights(1), weights(1)]);
        prop_assert_eq!(found, sum(&[gathers, Elements { payload: ring, sent: ring }]));
    }
}

/// The reference's SwiGLU correction: `BL·(2E/X + (3F + 2HQ)/(YZ))`, 1.36 times the two-matrix formula on 4×4×4, and the
/// best real X moves from 4.0 to 3.05.
#[test]
fn palm_540b_moves_more_than_the_two_matrix_formula() {
    let model = models::by_name("palm-540b").unwrap().with_heads(64);
    let layout = Layout { weights: WeightLayout::Stationary2D, attention: AttentionLayout::Batch };
    let mesh = Mesh::torus(4, 4, 4).unwrap();
    let workload = Workload::decode(64, 2048);
    let (program, sizes) = layout.program(&model, &mesh, &workload, LayoutOptions::default()).unwrap();
    let shared = moved(&program, &mesh, &sizes, |part| part == Part::Mlp).payload;
    let (e, f, hq) = (18432, 73728, 64 * 256);
    assert_eq!(shared, 64 * (2 * e / 4 + (3 * f + 2 * hq) / 16));
    let formula = 64 * 2 * (e / 4 + f / 16);
    let ratio = shared as f64 / formula as f64;
    assert!((ratio - 1.36).abs() < 0.005, "{ratio}");
    let best = |ff: f64| (64.0 * 2.0 * e as f64 / ff).sqrt();
    assert!((best(2.0 * f as f64) - 4.0).abs() < 1e-9);
    assert!((best((3 * f + 2 * hq) as f64) - 3.05).abs() < 0.005);
}

/// The reference's figure for a few GPUs: with SwiGLU, gathering all weights moves less than 1D from BL = 1.5F tokens on,
/// 21,504 at F = 14336.
#[test]
fn a_few_gpus_cross_over_at_one_and_a_half_f() {
    let model = models::by_name("llama-3-8b").unwrap();
    let mesh = Mesh::torus(1, 1, 4).unwrap();
    let payload = |weights, tokens: usize| {
        let layout = Layout { weights, attention: AttentionLayout::Heads };
        let workload = Workload::prefill(4, tokens / 4);
        let (program, sizes) = layout.program(&model, &mesh, &workload, LayoutOptions::default()).unwrap();
        moved(&program, &mesh, &sizes, |part| part == Part::Mlp).payload
    };
    let difference =
        |tokens| payload(WeightLayout::Stationary1D, tokens) as i64 - payload(WeightLayout::GatheredXYZ, tokens) as i64;
    assert_eq!(difference(21_504), 0);
    assert!(difference(21_500) < 0 && difference(21_508) > 0);
}
