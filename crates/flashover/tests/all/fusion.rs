//! Fusion around the kernels changes no bit: attention through Burn, whose CubeCL backend is wrapped in Fusion in this
//! build, against the same backend's methods called without it, on the same device.

use burn::backend::ops::{BoolTensorOps, FloatTensorOps, IntTensorOps};
use burn::backend::tensor::FloatTensor;
use burn::backend::{DispatchDevice, get_or_init_device_settings};
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::future::block_on;
use flashover::kernels::device::DeviceLimits;
use flashover::kernels::dropout::Dropout;
use flashover::kernels::mask::{Band, UNBOUNDED};
use flashover::kernels::operands::{Gradients, Operands, Wanted};
use flashover::kernels::problem::{Element, Problem};
use flashover::kernels::select::{KernelChoice, select};
use flashover::{AttentionBackend, AttentionOptions, Extras, InputGradients, MaybeBool, MaybeFloat, MaybeInt, Plan};
use flashover_testing::bridge::{self, Results};
use flashover_testing::data::{Case, Inputs};
use flashover_testing::score::with_waves;

use crate::devices;

/// What Burn wraps in Fusion.
type Bare = CubeBackend;

/// Combinations that reach every operand, every gradient, rows that see nothing, and several tiles a side.
fn cases(element: Element) -> Vec<Case> {
    let plain = Problem::new([2, 4, 37, 16], [2, 2, 70, 16], [2, 2, 70, 24], element).expect("sound");
    let everything = Problem {
        softcap: Some(5.0),
        alibi: true,
        bias: Some([1, 4, 1, 70]),
        mask: Some([2, 1, 37, 70]),
        band: Band { causal: true, left: 19, right: UNBOUNDED, sinks: 2 },
        key_lengths: true,
        learned_sinks: true,
        dropout: Some(Dropout { probability: 0.2, seed: 77 }),
        ..plain.clone()
    };
    let few_keys = Problem::new([1, 2, 70, 8], [1, 2, 33, 8], [1, 2, 33, 8], element).expect("sound");
    let few_keys = Problem { band: Band::causal(), bias: Some([1, 2, 70, 33]), ..few_keys };
    let with_function = with_waves(everything.clone());
    vec![Case::new(plain, 1), Case::new(everything, 2), Case::new(few_keys, 3), Case::new(with_function, 4)]
}

/// Attention without Fusion.
fn bare(problem: &Problem, inputs: &Inputs, lse_gradient: bool, device: &CubeDevice) -> Results {
    let selection = select(problem, &DeviceLimits::of(&device.client()), KernelChoice::Auto).expect("a kernel");
    let plan = Plan { problem: problem.clone(), blocks: None, selection: Some(selection) };
    let element = dtype(problem.element);
    let Operands { q, k, v, bias, mask, alibi_slopes, learned_sinks, score_parameters, key_lengths } = &inputs.operands;
    let p = problem;
    let q = floats(q, &[p.batch, p.heads_q, p.seq_q, p.head_dim], element, device);
    let k = floats(k, &[p.batch, p.heads_kv, p.seq_kv, p.head_dim], element, device);
    let v = floats(v, &[p.batch, p.heads_kv, p.seq_kv, p.value_dim], element, device);
    let per_head =
        |x: &Option<Vec<f64>>| MaybeFloat::from_option(x.as_ref().map(|x| floats(x, &[p.heads_q], DType::F32, device)));
    let booleans = DType::from(get_or_init_device_settings::<Bare>(device).bool_dtype);
    let extras = Extras::<Bare> {
        bias: MaybeFloat::from_option(
            bias.as_ref().map(|x| floats(x, &p.bias.expect("the problem has a bias"), element, device)),
        ),
        mask: MaybeBool::from_option(mask.as_ref().map(|x| {
            let data = TensorData::new(x.clone(), p.mask.expect("the problem has a mask"));
            Bare::bool_from_data(data.convert_dtype(booleans), device)
        })),
        alibi_slopes: per_head(alibi_slopes),
        learned_sinks: per_head(learned_sinks),
        score_parameters: MaybeFloat::from_option(
            score_parameters.as_ref().map(|x| floats(x, &[x.len()], DType::F32, device)),
        ),
        key_lengths: MaybeInt::from_option(
            key_lengths.as_ref().map(|x| Bare::int_from_data(TensorData::new(x.clone(), [p.batch]), device)),
        ),
    };
    let state = Bare::flashover_forward_state(q.clone(), k.clone(), v.clone(), extras.clone(), plan.clone(), true);
    let wanted = Wanted {
        q: true,
        k: true,
        v: true,
        bias: p.bias.is_some(),
        alibi_slopes: p.alibi,
        learned_sinks: p.learned_sinks,
        score_parameters: p.score.is_some(),
    };
    let backward = |do_: &[f64], dlse: Option<Vec<f64>>| {
        let do_ = floats(do_, &p.output_shape(), element, device);
        let dlse = MaybeFloat::from_option(dlse.map(|dlse| floats(&dlse, &p.lse_shape(), DType::F32, device)));
        let (q, k, v, extras, plan) = (q.clone(), k.clone(), v.clone(), extras.clone(), plan.clone());
        read_all(Bare::flashover_backward(q, k, v, extras, state.clone(), do_, dlse, plan, wanted))
    };
    let (o_read, lse_read) = (read(state.o.clone()), read(state.lse.clone()));
    let mut gradients = backward(&inputs.do_, None);
    if lse_gradient {
        // As Burn's two nodes: one backward through each output, added in f64.
        let seen = |(&dlse, &lse): (&f64, &f64)| if lse == f64::NEG_INFINITY { 0.0 } else { dlse };
        let dlse = inputs.dlse.iter().zip(&lse_read).map(seen).collect();
        gradients = bridge::sum(gradients, backward(&vec![0.0; inputs.do_.len()], Some(dlse)));
    }
    Results { o: o_read, lse: lse_read, gradients }
}

fn dtype(element: Element) -> DType {
    match element {
        Element::F32 => DType::F32,
        Element::F16 => DType::F16,
        other => panic!("not compared here: {other:?}"),
    }
}

fn floats(data: &[f64], shape: &[usize], dtype: DType, device: &CubeDevice) -> FloatTensor<Bare> {
    Bare::float_from_data(TensorData::new(data.to_vec(), shape.to_vec()).convert_dtype(dtype), device)
}

fn read(tensor: FloatTensor<Bare>) -> Vec<f64> {
    block_on(Bare::float_into_data(tensor)).expect("the device answers").iter::<f64>().collect()
}

fn read_all(gradients: InputGradients<Bare>) -> Gradients<Vec<f64>> {
    let read = |x: MaybeFloat<Bare>| x.into_option().map(read);
    let InputGradients { q, k, v, bias, alibi_slopes, learned_sinks, score_parameters } = gradients;
    Gradients {
        q: read(q),
        k: read(k),
        v: read(v),
        bias: read(bias),
        alibi_slopes: read(alibi_slopes),
        learned_sinks: read(learned_sinks),
        score_parameters: read(score_parameters),
    }
}

/// Every number of the results, with its name; f64 holds each of them exactly.
fn named(results: Results) -> Vec<(&'static str, Option<Vec<u64>>)> {
    let Gradients { q, k, v, bias, alibi_slopes, learned_sinks, score_parameters } = results.gradients;
    let all = [
        ("o", Some(results.o)),
        ("lse", Some(results.lse)),
        ("dq", q),
        ("dk", k),
        ("dv", v),
        ("dbias", bias),
        ("dalibi_slopes", alibi_slopes),
        ("dlearned_sinks", learned_sinks),
        ("dscore_parameters", score_parameters),
    ];
    all.map(|(name, x)| (name, x.map(|x| x.into_iter().map(f64::to_bits).collect()))).into()
}

fn assert_same(case: &str, fused: Results, bare: Results) {
    assert!(fused.o.iter().any(|&x| x != 0.0), "{case}: nothing but zeros");
    for ((name, fused), (_, bare)) in named(fused).into_iter().zip(named(bare)) {
        let differ = fused.iter().flatten().zip(bare.iter().flatten()).filter(|(fused, bare)| fused != bare).count();
        assert!(fused == bare, "{case}: {name}: {differ} numbers differ between Fusion on and off");
    }
}

/// The GPU with every element type that it has of those that are compared.
fn each(test: impl Fn(Element, &Device, &CubeDevice)) {
    let device = devices::gpu().expect("a build with a CubeCL backend");
    let DispatchDevice::Cube(bare) = device.as_dispatch() else { panic!("a CubeCL device") };
    for element in [Element::F32, Element::F16] {
        match device.supports_dtype(dtype(element)) {
            true => test(element, &device.clone().autodiff(), bare),
            false => devices::skip(&format!("fusion::{}", element.name()), "the device has no such dtype"),
        }
    }
}

#[test]
fn on_and_off_give_the_same() {
    each(|element, device, bare_device| {
        for case in cases(element) {
            let inputs = case.inputs();
            let fused = bridge::run(&case.problem, &inputs, true, device).expect("a sound call");
            assert_same(&case.name(), fused, bare(&case.problem, &inputs, true, bare_device));
        }
    });
}

/// Attention in the middle of what Fusion makes one kernel of: its operands and results are then handles of a stream
/// that has not run yet, and `o` is both an operand of what follows and saved for the backward. Products with 2 are
/// exact, so that the numbers must still be the same.
#[test]
fn between_operations_that_fuse() {
    each(|element, device, bare_device| {
        let case = &cases(element)[0];
        let (p, inputs) = (&case.problem, case.inputs());
        let [q, k, v] = {
            let t = bridge::Tensors::new(p, &inputs, device);
            // Keys and values as a projection leaves them, `[B, S, H, D]`.
            let place = (device, dtype(element));
            let stored = |x: Tensor<4>| Tensor::<4>::from_data(x.swap_dims(1, 2).into_data(), place);
            [t.q.detach(), stored(t.k.detach()), stored(t.v.detach())].map(Tensor::require_grad)
        };
        let (k4, v4) = (k.clone().mul_scalar(2.0).swap_dims(1, 2), v.clone().swap_dims(1, 2).mul_scalar(2.0));
        let q4 = q.clone().mul_scalar(2.0);
        let (o, lse) = flashover::attention_with_lse(q4, k4, v4, &AttentionOptions::new()).expect("a sound call");
        let o = o.mul_scalar(2.0);
        let do_ = bridge::floats(&inputs.do_, p.output_shape(), element, device);
        let mut store = (o.clone() * do_).cast(DType::F32).sum().backward();
        let mut gradient = |x: &Tensor<4>| x.grad_remove(&mut store).expect("tracked");
        let (dq, dk, dv) = (gradient(&q), gradient(&k).swap_dims(1, 2), gradient(&v).swap_dims(1, 2));
        let gradients = Gradients {
            q: Some(bridge::vec(dq)),
            k: Some(bridge::vec(dk)),
            v: Some(bridge::vec(dv)),
            ..Default::default()
        };
        let fused = Results { o: bridge::vec(o), lse: bridge::vec(lse), gradients };

        let twice = |x: &[f64]| x.iter().map(|x| 2.0 * x).collect::<Vec<_>>();
        let mut doubled = inputs.clone();
        for x in [&mut doubled.operands.q, &mut doubled.operands.k, &mut doubled.operands.v, &mut doubled.do_] {
            *x = twice(x);
        }
        let mut expected = bare(p, &doubled, false, bare_device);
        let Gradients { q, k, v, .. } = &mut expected.gradients;
        for x in [&mut expected.o, q.as_mut().unwrap(), k.as_mut().unwrap(), v.as_mut().unwrap()] {
            *x = twice(x);
        }
        assert_same(&format!("{} times two", case.name()), fused, expected);
    });
}
