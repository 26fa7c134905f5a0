//! `explain` says beforehand what the launches then record. A program of its own, with one test: the launch log hears
//! every thread of the process.

use burn::tensor::{DType, Device, Distribution, Tensor};
use flashover::kernels::block_plan::TileSize;
use flashover::kernels::launch_log;
use flashover::kernels::mask::Mask;
use flashover::{AttentionOptions, Precision, SparsePlan, attention, explain};
use flashover_testing::score::Buckets;

#[path = "all/devices.rs"]
#[allow(dead_code)]
mod devices;

fn holds(device: &Device, dtype: DType, options: fn(&Device, DType) -> AttentionOptions) {
    let device = device.clone().autodiff();
    let normal = |shape: [usize; 4]| {
        Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), &device).cast(dtype).detach().require_grad()
    };
    let (q, k, v) = (normal([2, 4, 70, 24]), normal([2, 2, 90, 24]), normal([2, 2, 90, 40]));
    let options = options(&device, dtype);
    let answer = explain(&q, &k, &v, &options).expect("a sound call");
    let launches = |work: &dyn Fn()| {
        let ((), launches) = launch_log::listen(|| {
            work();
            device.sync().expect("the device answers");
        });
        launches
    };
    device.sync().expect("the device answers");
    let expected = |steps: &[flashover::Step]| steps.iter().map(|step| step.launch.clone()).collect::<Vec<_>>();
    let forward = launches(&|| drop(attention(q.clone(), k.clone(), v.clone(), &options).expect("a sound call")));
    assert!(!forward.is_empty() && forward == expected(&answer.forward), "{forward:#?}\n{answer:#?}");
    let o = attention(q.clone(), k.clone(), v.clone(), &options).expect("a sound call");
    device.sync().expect("the device answers");
    let backward = launches(&|| drop(o.clone().sum().backward()));
    assert!(!backward.is_empty() && backward == expected(&answer.backward), "{backward:#?}\n{answer:#?}");
    for launch in forward.iter().chain(&backward) {
        // What every WebGPU device grants; the matrix kernels do not run where there is no more.
        let granted = launch.bindings <= 7 && launch.shared_bytes <= 16 * 1024 && launch.units <= 256;
        assert!(
            granted || ["_mma", "_cmma", "_hopper"].iter().any(|family| launch.kernel.ends_with(family)),
            "{launch:?}"
        );
    }
    assert!(answer.to_string().contains(&answer.reason));
}

fn plain(_: &Device, _: DType) -> AttentionOptions {
    AttentionOptions::new().causal()
}

fn unordered(_: &Device, _: DType) -> AttentionOptions {
    AttentionOptions::new().deterministic(false)
}

fn rounded(_: &Device, _: DType) -> AttentionOptions {
    AttentionOptions::new().causal().precision(Precision::Tf32x3)
}

fn everything(device: &Device, dtype: DType) -> AttentionOptions {
    let vector = |n: usize| Tensor::<1>::ones([n], device).require_grad();
    let bias = Tensor::<4>::ones([1, 4, 1, 90], device).cast(dtype).detach().require_grad();
    let mask = Tensor::from_bool(burn::tensor::TensorData::new(vec![false; 90], [1, 1, 1, 90]), device);
    let lengths = Tensor::from_ints([80, 90], device);
    let options = AttentionOptions::new().sliding_window(20).visible_sinks(2).softcap(5.0).dropout(0.1, 7);
    let options = options.bias(bias).mask(mask).key_lengths(lengths);
    options.alibi_slopes(vector(4)).learned_sinks(vector(4))
}

fn with_function(device: &Device, dtype: DType) -> AttentionOptions {
    let table = Tensor::<2>::ones([4, 32], device).require_grad();
    everything(device, dtype).score_function(Buckets, table)
}

fn planned(device: &Device, dtype: DType) -> AttentionOptions {
    let mask = Mask::causal() & Mask::window(20, 0);
    let plan = SparsePlan::with_tile(&mask, [2, 4, 70, 90], TileSize { bq: 64, bk: 32 }).expect("sound");
    with_function(device, dtype).plan(&plan)
}

#[test]
fn explain_holds_against_the_launch_log() {
    let holds_on = |device: &Device, dtype: DType| {
        holds(device, dtype, plain);
        holds(device, dtype, unordered);
        holds(device, dtype, everything);
        holds(device, dtype, with_function);
        holds(device, dtype, planned);
    };
    holds_on(&devices::flex(), DType::F32);
    holds_on(&devices::flex(), DType::F16);
    holds(&devices::flex(), DType::F32, rounded);
    let Some(device) = devices::gpu() else { return devices::skip("explain", "this build has no GPU backend") };
    holds_on(&device, DType::F32);
    holds(&device, DType::F32, rounded);
    if device.supports_dtype(DType::F16) {
        holds_on(&device, DType::F16);
    } else {
        devices::skip("explain", "the GPU has no f16");
    }
}
