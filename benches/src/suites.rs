//! The suites: which cases, which peers, which figures.

use burn::tensor::{Device, Tensor};
use flashover::kernels::mask::Band;
use flashover::kernels::problem::Element;

use crate::case::{Case, Tensors};
use crate::peers::pattern::Pattern;
use crate::report::{Report, Run};
use crate::{gate, gemm, memory, sparse, timing, torch};

/// How to run a suite.
pub struct Plan {
    /// Samples a figure.
    pub repeats: usize,
    /// Only cases whose name contains this.
    pub only: Option<String>,
}

impl Plan {
    fn takes(&self, case: &Case) -> bool {
        self.takes_name(&case.name())
    }

    /// Whether a case of that name is asked for.
    pub fn takes_name(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only))
    }
}

/// The native CPU path: B1 H8 D64 at S 4096 against Burn's Flex, the GEMM rate, PyTorch; memory up to S 65,536.
pub fn flex(plan: &Plan, report: &mut Report) -> Result<(), String> {
    let device = Device::flex();
    let run = Run::new("flex", cpu_name(), None);
    let gemm = gemm::f32_rate(2048, plan.repeats);
    match &gemm {
        Some((rate, name)) => println!("f32 GEMM 2048³: {:.1} GFLOP/s ({name}); ours runs {}", rate / 1e9, simd()),
        None => println!("f32 GEMM: none at hand on this CPU"),
    }
    for band in [Band::causal(), Band::default()] {
        let case = Case::new(band, 1, 8, 4096, 64, Element::F32);
        if !plan.takes(&case) {
            continue;
        }
        compare(&run, plan, &case, &device, report)?;
        let rows = report.rows();
        let forward = rows.iter().rfind(|row| row.metric == "forward_ms").map(|row| row.ours).expect("just measured");
        if let Some((rate, _)) = &gemm {
            let ours = case.forward_flops() / forward / 1e9;
            report.push(run.more(&case.name(), "tflops", ours, Some(("gemm", rate / 1e12))))?;
        }
        match torch::forward_ms(&case, plan.repeats) {
            Ok(ms) => report.push(run.less(&case.name(), "forward_ms", forward, Some(("torch_cpu", ms))))?,
            Err(reason) => println!("torch_cpu not measured: {reason}"),
        }
    }
    let long = Case::new(Band::default(), 1, 8, 8192, 64, Element::F32);
    densities(&run, plan, &long, &device, report)?;
    memory_slope(&run, plan, Element::F32, &device, report)?;
    Ok(())
}

/// The default device of the build's features, against Burn's own attention; memory up to S 65,536.
pub fn gpu(plan: &Plan, report: &mut Report) -> Result<(), String> {
    let device = Device::default();
    if device == Device::flex() {
        return Err(
            "suite gpu: expected a build with a GPU feature (cuda, rocm, vulkan, webgpu, metal), got Flex".into()
        );
    }
    let name = format!("{device:?}");
    let card = if name.contains("Cuda") { cuda_card() } else { None };
    let run = match card {
        Some((card, driver)) => Run::new("gpu", card, Some(driver)),
        None => Run::new("gpu", name, None),
    };
    let f16 = device.supports_dtype(burn::tensor::DType::F16);
    let elements = if f16 { vec![Element::F32, Element::F16] } else { vec![Element::F32] };
    for element in elements {
        for (band, batch, heads, seq, dim) in [
            (Band::causal(), 4, 16, 4096, 128),
            (Band::default(), 4, 16, 4096, 128),
            (Band::causal(), 16, 16, 1024, 128),
        ] {
            let case = Case::new(band, batch, heads, seq, dim, element);
            if plan.takes(&case) {
                compare(&run, plan, &case, &device, report)?;
            }
        }
        let long = Case::new(Band::default(), 1, 16, 16_384, 128, element);
        densities(&run, plan, &long, &device, report)?;
        memory_slope(&run, plan, element, &device, report)?;
    }
    Ok(())
}

/// Block plans at several densities, if cases of that name are asked for.
fn densities(run: &Run, plan: &Plan, case: &Case, device: &Device, report: &mut Report) -> Result<(), String> {
    let name = format!("{}_density", case.name());
    if plan.only.as_ref().is_some_and(|only| !name.contains(only)) {
        return Ok(());
    }
    println!("{name}: checking, then timing");
    sparse::densities(run, plan.repeats, case, device, report)
}

/// Memory of forward and backward in a window, as the sequence grows.
fn memory_slope(run: &Run, plan: &Plan, element: Element, device: &Device, report: &mut Report) -> Result<(), String> {
    for seq in [4096, 8192, 16_384, 32_768, 65_536] {
        let case = Case::new(Pattern::Window { keys: 1024 }.band(), 1, 8, seq, 64, element);
        if plan.takes(&case) {
            println!("{}: checking, then counting memory", case.name());
            gate::check(&case, device)?;
            let bytes = peak_of(&case, device, |case, t| Some(case.ours(t))).expect("ours always runs");
            report.push(run.less(&case.name(), "peak_extra_bytes", bytes, None))?;
        }
    }
    Ok(())
}

/// Forward, backward and both, ours against Burn's, and the memory of both.
fn compare(run: &Run, plan: &Plan, case: &Case, device: &Device, report: &mut Report) -> Result<(), String> {
    let name = case.name();
    println!("{name}: checking, then timing");
    gate::check(case, device)?;
    let t = case.tensors(device);
    let sync = |device: &Device| device.sync().expect("the device answers");
    let forward = |burn: bool| {
        let call = || {
            let o = if burn { case.burn(&t) } else { Some(case.ours(&t)) };
            sync(device);
            o
        };
        timing::milliseconds(call).1
    };
    let [ours, peer] = timing::interleaved(plan.repeats, [&mut || forward(false), &mut || forward(true)]);
    report.push(run.less(&name, "forward_ms", ours, Some(("burn", peer))))?;
    report.push(run.more(
        &name,
        "tflops",
        case.forward_flops() / ours / 1e9,
        Some(("burn", case.forward_flops() / peer / 1e9)),
    ))?;

    drop(t);
    let device = device.clone().autodiff();
    let t = case.tensors(&device);
    let both = |burn: bool, backward_alone: bool| {
        let start = std::time::Instant::now();
        let o = if burn { case.burn(&t).expect("Burn has this attention") } else { case.ours(&t) };
        let middle = if backward_alone {
            sync(&device);
            std::time::Instant::now()
        } else {
            start
        };
        let gradients = loss(o).backward();
        sync(&device);
        drop(gradients);
        middle.elapsed().as_secs_f64() * 1e3
    };
    let [ours, peer, ours_backward, peer_backward] = timing::interleaved(
        plan.repeats,
        [&mut || both(false, false), &mut || both(true, false), &mut || both(false, true), &mut || both(true, true)],
    );
    report.push(run.less(&name, "forward_backward_ms", ours, Some(("burn", peer))))?;
    report.push(run.less(&name, "backward_ms", ours_backward, Some(("burn", peer_backward))))?;
    drop(t);
    let ours = peak_of(case, &device, |case, t| Some(case.ours(t))).expect("ours always runs");
    let peer = peak_of(case, &device, |case, t| case.burn(t)).expect("Burn has this attention");
    report.push(run.less(&name, "peak_extra_bytes", ours, Some(("burn", peer))))?;
    Ok(())
}

/// What a case calls: ours or the peer; `None` if that has no such attention.
type Call = fn(&Case, &Tensors) -> Option<Tensor<4>>;

/// Peak bytes of forward and backward beyond the operands: counted by the device's pools, or on the CPU by the
/// allocator.
fn peak_of(case: &Case, device: &Device, call: Call) -> Option<f64> {
    let device = device.clone().autodiff();
    if device.memory_pool_usage().is_some() {
        let count = || device_peak_of(case, &device, call);
        return std::thread::scope(|scope| scope.spawn(count).join()).expect("the measurement ends");
    }
    let t = case.tensors(&device);
    let (ran, bytes) = memory::peak_extra(|| {
        let o = call(case, &t)?;
        Some(loss(o).backward())
    });
    ran.map(|_| bytes as f64)
}

/// On a thread that has not used the device before.
fn device_peak_of(case: &Case, device: &Device, call: Call) -> Option<f64> {
    let t = case.tensors(device);
    drop(loss(call(case, &t)?).backward());
    let mut peak = memory::DevicePeak::start(device)?;
    let o = call(case, &t)?;
    peak.look();
    let gradients = loss(o).backward();
    peak.look();
    drop(gradients);
    Some(peak.bytes() as f64)
}

/// A loss whose gradient is not constant.
fn loss(o: Tensor<4>) -> Tensor<1> {
    (o.clone() * o.detach()).sum()
}

fn simd() -> &'static str {
    flashover::flex_simd()
}

/// NVIDIA's card and the version of its driver, where NVIDIA's tool is at hand.
pub fn cuda_card() -> Option<(String, String)> {
    let arguments = ["--query-gpu=name,driver_version", "--format=csv,noheader"];
    let output = std::process::Command::new("nvidia-smi").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (card, driver) = text.lines().next()?.split_once(", ")?;
    Some((card.into(), driver.trim().into()))
}

fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {threads} threads", model.unwrap_or("CPU").trim())
}
