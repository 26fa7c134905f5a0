//! Forward and backward against a naive reference in f64, over a spread of options, layouts and element types.

mod reference;

use flashover_kernels::dropout::Dropout;
use flashover_kernels::launch_log;
use flashover_kernels::mask::{Band, UNBOUNDED};
use flashover_kernels::operands::Wanted;
use flashover_kernels::problem::Problem;
use half::{bf16, f16};

use self::reference::{Reference, reference};
use super::backward::Gradients;
use super::real::Real;
use super::{Float, Inputs, View, backward, forward};

const ALL: Wanted =
    Wanted { q: true, k: true, v: true, bias: true, alibi_slopes: true, learned_sinks: true, score_parameters: false };

/// A small generator, so that a case can be named by a number.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = self.0 ^ (self.0 >> 29);
        x.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 16
    }

    fn pick<X: Copy>(&mut self, from: &[X]) -> X {
        from[self.next() as usize % from.len()]
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    /// About normal, variance 1.
    fn value(&mut self) -> f64 {
        (0..6).map(|_| (self.next() % 65_536) as f64 / 65_536.0 - 0.5).sum::<f64>() * std::f64::consts::SQRT_2
    }
}

/// A tensor in some layout; what lies between its elements is NaN.
struct Tensor<T> {
    data: Vec<T>,
    offset: usize,
    shape: [usize; 4],
    strides: [isize; 4],
}

impl<T: Float> Tensor<T> {
    fn new(random: &mut Random, shape: [usize; 4]) -> Self {
        let order = random.pick(&[[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2], [3, 2, 1, 0]]);
        let (gap, flip) = (random.pick(&[0, 0, 1, 5]), random.pick(&[None, None, None, Some(2), Some(3), Some(1)]));
        let mut strides = [0; 4];
        let mut size = 1;
        for &axis in order.iter().rev() {
            strides[axis] = size as isize;
            size = size * shape[axis] + gap;
        }
        let mut data = vec![T::narrow(T::Compute::from_f64(f64::NAN)); size + 3];
        let mut offset = 3;
        if let Some(axis) = flip {
            offset += strides[axis] as usize * shape[axis].saturating_sub(1);
            strides[axis] = -strides[axis];
        }
        for n in 0..shape.iter().product() {
            let at = indices(n, shape);
            let index = (0..4).fold(offset as isize, |x, axis| x + at[axis] as isize * strides[axis]);
            data[index as usize] = T::narrow(T::Compute::from_f64(random.value()));
        }
        Tensor { data, offset, shape, strides }
    }

    fn view(&self) -> View<'_, T> {
        View::new(&self.data, self.offset, self.shape, self.strides)
    }

    fn at(&mut self, at: [usize; 4]) -> &mut T {
        let index = (0..4).fold(self.offset as isize, |x, axis| x + at[axis] as isize * self.strides[axis]);
        &mut self.data[index as usize]
    }

    fn contiguous(&self) -> Vec<T> {
        let value = |n| {
            let [b, h, i, j] = indices(n, self.shape);
            self.view().at(b, h, i, j)
        };
        (0..self.shape.iter().product()).map(value).collect()
    }
}

/// Indices of element `n` of a contiguous tensor.
fn indices(n: usize, [_, h, s, d]: [usize; 4]) -> [usize; 4] {
    [n / (h * s * d), n / (s * d) % h, n / d % s, n % d]
}

struct Case<T: Float> {
    problem: Problem,
    q: Tensor<T>,
    k: Tensor<T>,
    v: Tensor<T>,
    do_: Tensor<T>,
    bias: Option<Tensor<T>>,
    mask: Option<(Vec<u8>, [usize; 4])>,
    slopes: Option<Vec<T::Compute>>,
    sinks: Option<Vec<T::Compute>>,
    key_lengths: Option<Vec<i32>>,
    dlse: Vec<f32>,
}

struct Outcome<T: Float> {
    o: Vec<T>,
    lse: Vec<f32>,
    gradients: Gradients<T>,
}

impl<T: Float> Case<T> {
    /// The case of a number: shapes and options are drawn from it.
    fn random(seed: u64) -> Self {
        let mut r = Random(seed);
        let (b, hkv, group) = (r.pick(&[1, 2]), r.pick(&[1, 2]), r.pick(&[1, 1, 2, 3]));
        let lengths = [0, 1, 7, 63, 64, 65, 113, 150];
        let (sq, skv) = (r.pick(&lengths), r.pick(&lengths));
        let dims = [1, 8, 17, 59, 64, 111];
        let (d, dv) = (r.pick(&dims), r.pick(&dims));
        let mut case = Case::plain(&mut r, [b, hkv * group, sq, d], [b, hkv, skv, d], dv);
        case.add_options(&mut r);
        case
    }

    fn plain(r: &mut Random, q: [usize; 4], k: [usize; 4], dv: usize) -> Self {
        let v = [k[0], k[1], k[2], dv];
        let problem = Problem::new(q, k, v, T::ELEMENT).unwrap();
        Case {
            q: Tensor::new(r, q),
            k: Tensor::new(r, k),
            v: Tensor::new(r, v),
            do_: Tensor::new(r, problem.output_shape()),
            bias: None,
            mask: None,
            slopes: None,
            sinks: None,
            key_lengths: None,
            dlse: (0..q[0] * q[1] * q[2]).map(|_| r.value() as f32).collect(),
            problem,
        }
    }

    fn add_options(&mut self, r: &mut Random) {
        let p = &mut self.problem;
        if r.chance(50) {
            let (left, right) = r.pick(&[(UNBOUNDED, UNBOUNDED), (5, 3), (40, 0), (UNBOUNDED, 9), (70, UNBOUNDED)]);
            p.band = Band { causal: r.chance(60), left, right, sinks: r.pick(&[0, 0, 3, 70]) };
        }
        p.scale = if r.chance(30) { 0.3 } else { p.scale };
        p.softcap = r.chance(25).then_some(1.7);
        p.dropout = r.chance(25).then(|| Dropout { probability: 0.3, seed: r.next() });
        let compute = |r: &mut Random| T::Compute::from_f64(r.value() * 0.2);
        if r.chance(25) {
            p.alibi = true;
            self.slopes = Some((0..p.heads_q).map(|_| compute(r)).collect());
        }
        if r.chance(25) {
            p.learned_sinks = true;
            self.sinks = Some((0..p.heads_q).map(|_| compute(r)).collect());
        }
        if r.chance(25) {
            p.key_lengths = true;
            self.key_lengths = Some((0..p.batch).map(|_| r.pick(&[-4, 0, 1, 20, 64, 100, 9999])).collect());
        }
        let full = p.score_shape();
        let part = |r: &mut Random| full.map(|n| if r.chance(50) { 1 } else { n });
        if r.chance(35) {
            let shape = if r.chance(30) { full } else { part(r) };
            p.bias = Some(shape);
            let mut bias = Tensor::new(r, shape);
            for n in 0..shape.iter().product() {
                if r.chance(10) {
                    *bias.at(indices(n, shape)) = T::narrow(T::Compute::NEG_INFINITY);
                }
            }
            self.bias = Some(bias);
        }
        if r.chance(35) {
            let shape = part(r);
            p.mask = Some(shape);
            self.mask = Some(((0..shape.iter().product()).map(|_| u8::from(r.chance(40))).collect(), shape));
        }
        p.validate().unwrap();
    }

    fn inputs(&self) -> Inputs<'_, T> {
        Inputs {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            bias: self.bias.as_ref().map(Tensor::view),
            mask: self.mask.as_ref().map(|(data, shape)| View::contiguous(data, *shape)),
            alibi_slopes: self.slopes.as_deref(),
            score_parameters: None,
            learned_sinks: self.sinks.as_deref(),
            key_lengths: self.key_lengths.as_deref(),
            plan: None,
        }
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            bias: self.bias.is_some(),
            alibi_slopes: self.problem.alibi,
            learned_sinks: self.problem.learned_sinks,
            ..ALL
        }
    }

    fn run(&self, wanted: Wanted) -> Outcome<T> {
        let rows = self.dlse.len();
        let mut o = vec![T::narrow(T::Compute::from_f64(f64::NAN)); rows * self.problem.value_dim];
        let mut lse = vec![f32::NAN; rows];
        forward(&self.problem, &self.inputs(), &mut o, Some(&mut lse));
        let o_view = View::contiguous(&o, self.problem.output_shape());
        let gradients =
            backward(&self.problem, &self.inputs(), o_view, &lse, self.do_.view(), Some(&self.dlse), wanted);
        Outcome { o, lse, gradients }
    }

    fn reference(&self) -> Reference {
        reference(&self.problem, &self.inputs(), &self.do_.contiguous(), &self.dlse)
    }
}

impl<T: Float> Outcome<T> {
    /// Every tensor with its name and the reference's, as f64.
    fn beside<'r>(&self, reference: &'r Reference) -> Vec<(&'static str, Vec<f64>, &'r [f64])> {
        let f = |x: &[T]| x.iter().map(|x| x.widen().to_f64()).collect::<Vec<_>>();
        let c = |x: &[T::Compute]| x.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
        let g = &self.gradients;
        let mut all = vec![
            ("o", f(&self.o), &reference.o[..]),
            ("lse", self.lse.iter().map(|&x| f64::from(x)).collect(), &reference.lse[..]),
        ];
        let tensors = [
            ("dq", &g.q, &reference.dq),
            ("dk", &g.k, &reference.dk),
            ("dv", &g.v, &reference.dv),
            ("dbias", &g.bias, &reference.dbias),
        ];
        all.extend(tensors.into_iter().filter_map(|(name, x, y)| Some((name, f(x.as_deref()?), &y[..]))));
        let vectors =
            [("dslopes", &g.alibi_slopes, &reference.dslopes), ("dsinks", &g.learned_sinks, &reference.dsinks)];
        all.extend(vectors.into_iter().filter_map(|(name, x, y)| Some((name, c(x.as_deref()?), &y[..]))));
        all
    }

    /// Largest difference from the reference, over the largest magnitude (at least 1) of the tensor.
    fn check(&self, reference: &Reference, tolerance: impl Fn(&str) -> f64, what: &str) {
        for (name, found, expected) in self.beside(reference) {
            assert_eq!(found.len(), expected.len(), "{what}: elements of {name}");
            let least = if name == "dslopes" { reference.slope_terms } else { 1.0 };
            let size = expected.iter().filter(|x| x.is_finite()).fold(least, |m, x| m.max(x.abs()));
            for (n, (&x, &y)) in found.iter().zip(expected).enumerate() {
                let close = x == y || (x - y).abs() <= tolerance(name) * size;
                assert!(close, "{what}: {name}[{n}] is {x}, expected {y} (of magnitude {size})");
            }
        }
    }
}

/// Differences that rounding explains, by element type: f32 has 2⁻²⁴, and sums of some hundred terms.
fn check_random<T: Float>(seeds: std::ops::Range<u64>, tolerance: impl Fn(&str) -> f64) {
    for seed in seeds {
        let case = Case::<T>::random(seed);
        let what = format!("seed {seed}, {:?}", case.problem);
        case.run(case.wanted()).check(&case.reference(), &tolerance, &what);
    }
}

#[test]
fn random_problems_in_f32_match_the_reference() {
    check_random::<f32>(0..400, |_| 1e-5);
}

#[test]
fn random_problems_in_f64_match_the_reference_nearly_to_f64() {
    check_random::<f64>(1000..1200, |name| if name == "lse" { 1e-7 } else { 1e-12 });
}

#[test]
fn random_problems_in_half_precision_match_the_reference() {
    // o is rounded before delta is taken from it, so the gradients feel the rounding too.
    check_random::<f16>(2000..2120, |name| if name == "lse" { 1e-5 } else { 4e-3 });
    check_random::<bf16>(3000..3120, |name| if name == "lse" { 1e-5 } else { 3e-2 });
}

#[test]
fn several_tiles_of_wide_heads_match_the_reference() {
    for (seed, d, dv) in [(1, 256, 256), (2, 256, 3), (3, 2, 200), (4, 128, 192)] {
        let mut r = Random(seed);
        let mut case = Case::<f32>::plain(&mut r, [1, 4, 200, d], [1, 2, 333, d], dv);
        case.problem.band = Band { causal: true, left: 150, right: 0, sinks: 2 };
        case.run(case.wanted()).check(&case.reference(), |_| 1e-5, &format!("seed {seed}"));
    }
}

/// Scores of magnitude 30: maxima grow by more than the forward's slack from tile to tile, with and without a sink.
#[test]
fn maxima_that_grow_rescale_what_was_summed() {
    for sink in [None, Some(vec![-40.0, 5.0])] {
        let mut case = Case::<f64>::plain(&mut Random(6), [1, 2, 70, 40], [1, 1, 700, 40], 24);
        case.problem.scale = 4.0;
        case.problem.learned_sinks = sink.is_some();
        case.sinks = sink;
        case.run(case.wanted()).check(&case.reference(), |name| if name == "lse" { 1e-7 } else { 1e-11 }, "growing");
    }
}

/// NaN and infinity stand exactly where the reference, which touches visible keys only, has them.
#[test]
fn non_finite_operands_reach_only_what_sees_them() {
    let mut reached = [0usize; 2];
    for seed in 0..150 {
        let mut case = Case::<f32>::random(5000 + seed);
        let mut r = Random(seed);
        let p = case.problem.clone();
        if p.is_empty() || p.seq_kv == 0 {
            continue;
        }
        let bad = r.pick(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
        let (b, h, i, j) =
            (r.next() as usize % p.batch, r.next() as usize, r.next() as usize % p.seq_q, r.next() as usize % p.seq_kv);
        match r.next() % 4 {
            0 => *case.q.at([b, h % p.heads_q, i, 0]) = bad,
            1 => *case.do_.at([b, h % p.heads_q, i, p.value_dim - 1]) = bad,
            2 => *case.k.at([b, h % p.heads_kv, j, p.head_dim - 1]) = bad,
            _ => *case.v.at([b, h % p.heads_kv, j, 0]) = bad,
        }
        let reference = case.reference();
        for (name, found, expected) in case.run(case.wanted()).beside(&reference) {
            for (n, (x, y)) in found.iter().zip(expected).enumerate() {
                // −∞ is what the lse of a row that sees nothing is.
                let finite = |x: f64| x.is_finite() || (name == "lse" && x == f64::NEG_INFINITY);
                assert_eq!(finite(*x), finite(*y), "seed {seed} {p:?}: {name}[{n}] is {x}, expected {y}");
                reached[usize::from(finite(*y))] += 1;
                let size = if name == "dslopes" { reference.slope_terms.max(1e3) } else { y.abs().max(30.0) };
                let close = !finite(*y) || x == y || (x - y).abs() <= 1e-5 * size;
                assert!(close, "seed {seed} {p:?}: {name}[{n}] is {x}, expected {y}");
            }
        }
    }
    assert!(reached.iter().all(|&n| n > 10_000), "non-finite and finite results occur: {reached:?}");
}

#[test]
fn rows_that_see_nothing_give_zeros() {
    let mut case = Case::<f32>::plain(&mut Random(8), [1, 2, 70, 16], [1, 2, 40, 16], 16);
    case.problem.band = Band::causal();
    let outcome = case.run(case.wanted());
    // The last 40 of 70 queries are aligned to the 40 keys; the first 30 see none.
    for (row, (o, &lse)) in outcome.o.chunks_exact(16).zip(&outcome.lse).enumerate() {
        let dead = row % 70 < 30;
        assert_eq!(lse == f32::NEG_INFINITY, dead, "row {row}");
        assert_eq!(o.iter().all(|&x| x == 0.0), dead, "row {row}");
        let dq = &outcome.gradients.q.as_ref().unwrap()[row * 16..][..16];
        assert_eq!(dq.iter().all(|&x| x == 0.0), dead, "row {row}");
    }
    case.problem.learned_sinks = true;
    case.sinks = Some(vec![0.25, -3.0]);
    let outcome = case.run(case.wanted());
    assert_eq!((outcome.lse[0], outcome.lse[70], outcome.o[0]), (0.25, -3.0, 0.0));
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for (seed, hkv) in [(1, 1), (2, 3), (3, 4)] {
        let mut r = Random(seed);
        let mut case = Case::<f16>::plain(&mut r, [1, 2 * hkv, 300, 40], [1, hkv, 390, 40], 24);
        case.problem.band = Band::causal();
        case.problem.alibi = true;
        case.slopes = Some(vec![0.1; 2 * hkv]);
        case.problem.learned_sinks = true;
        case.sinks = Some(vec![0.5; 2 * hkv]);
        for shape in [[1, 1, 300, 390], [1, 2 * hkv, 300, 390], [1, 1, 1, 390]] {
            case.problem.bias = Some(shape);
            case.bias = Some(Tensor::new(&mut r, shape));
            let bits = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let outcome = pool.install(|| case.run(ALL));
                let g = &outcome.gradients;
                let halves = [Some(&outcome.o), g.q.as_ref(), g.k.as_ref(), g.v.as_ref(), g.bias.as_ref()];
                let singles = [Some(&outcome.lse), g.alibi_slopes.as_ref(), g.learned_sinks.as_ref()];
                let halves = halves.into_iter().flat_map(|x| x.unwrap()).map(|x| u32::from(x.to_bits()));
                halves.chain(singles.into_iter().flat_map(|x| x.unwrap()).map(|x| x.to_bits())).collect::<Vec<_>>()
            };
            let one = bits(1);
            for threads in [2, 3, 5, 16] {
                assert!(bits(threads) == one, "{threads} threads, {hkv} key heads, bias {shape:?}");
            }
        }
    }
}

#[test]
fn only_wanted_gradients_are_computed_and_they_are_the_same() {
    let mut case = Case::<f32>::plain(&mut Random(4), [2, 4, 100, 32], [2, 2, 90, 32], 20);
    case.add_options(&mut Random(12));
    case.problem.alibi = true;
    case.slopes = Some(vec![0.1; 4]);
    let all = case.run(case.wanted()).gradients;
    let none = Wanted::default();
    for wanted in [
        Wanted { q: true, ..none },
        Wanted { k: true, ..none },
        Wanted { v: true, ..none },
        Wanted { q: true, v: true, ..none },
        Wanted { alibi_slopes: true, ..none },
        none,
    ] {
        let some = case.run(wanted).gradients;
        for (asked, x, y) in [
            (wanted.q, &some.q, &all.q),
            (wanted.k, &some.k, &all.k),
            (wanted.v, &some.v, &all.v),
            (wanted.alibi_slopes, &some.alibi_slopes, &all.alibi_slopes),
        ] {
            assert_eq!(x.as_ref(), y.as_ref().filter(|_| asked), "{wanted:?}");
        }
    }
}

#[test]
fn launches_are_noted() {
    let case = Case::<f32>::plain(&mut Random(4), [1, 1, 9, 8], [1, 1, 9, 8], 8);
    let (_, launches) = launch_log::listen(|| case.run(case.wanted()));
    for kernel in ["flex_forward", "flex_backward"] {
        let launch = launches.iter().find(|launch| launch.kernel == kernel).unwrap();
        assert!(launch.config.contains("bq=64") && launch.scratch_bytes > 0, "{launch:?}");
    }
}
