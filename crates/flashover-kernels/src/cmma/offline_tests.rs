//! The kernels through CubeCL's compilers for the runtimes that no device here has: Vulkan (SPIR-V), ROCm (HIP) and Metal. What
//! comes out is what a driver would take on; `FLASHOVER_KERNELS_DUMP=folder` compiles more problems and keeps it, for `spirv-val` to
//! read. `cargo test -p flashover-kernels --lib --features compilers offline`: the feature is off else, see Cargo.toml.

use std::sync::Arc;

use cubecl::device::DeviceId;
use cubecl::ir::features::{Features, MmaConfig, Plane};
use cubecl::ir::{DeviceIdentity, HardwareProperties, MemoryDeviceProperties};
use cubecl::prelude::*;
use cubecl::server::Handle;
use cubecl::{Compiler, CubeKernel};
use cubecl_cpp::shared::{CompilationOptions, CppCompiler, CppSupportedFeatures};
use cubecl_cpp::{hip::arch::AmdWmma, target};

use super::backward_keys::backward_keys_kernel;
use super::backward_queries::backward_queries_kernel;
use super::config::{CmmaConfig, CmmaTile, Compiled};
use super::forward::forward_kernel;
use crate::device::{DeviceLimits, DeviceTensor, element_type};
use crate::family::launcher::numbers;
use crate::family::scratch::{Layout, Partials};
use crate::problem::{Element, Problem};

/// A device that reports matrices of one size.
fn properties(plane: u32, edge: u32) -> Arc<DeviceProperties> {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: plane,
        plane_size_max: plane,
        max_bindings: 32,
        max_shared_memory_size: 65536,
        max_cube_count: (u32::MAX, u16::MAX as u32, u16::MAX as u32),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 1024),
        num_streaming_multiprocessors: None,
        num_tensor_cores: None,
        min_tensor_cores_dim: Some(edge),
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: 4,
        cube_mma_reserved_shared_memory: 0,
    };
    let mut features = Features::default();
    features.plane.insert(Plane::Ops);
    for element in [Element::F16, Element::BF16].map(element_type) {
        let cd_type = element_type(Element::F32);
        features.matmul.cmma.insert(MmaConfig { a_type: element, b_type: element, cd_type, m: edge, n: edge, k: edge });
    }
    let identity = DeviceIdentity { name: "offline".into(), fingerprint: "offline".into(), physical: None };
    let memory = MemoryDeviceProperties::new(u64::MAX, 256);
    Arc::new(DeviceProperties::new(features, memory, hardware, cubecl::profile::TimingMethod::Device, identity))
}

/// A tensor that nobody reads.
fn tensor(shape: &[usize], elem: ElemType) -> DeviceTensor {
    struct Nowhere;
    let device = DeviceId { type_id: 0, index_id: 0 };
    let service = cubecl_common::device::ServiceId::of::<Nowhere>(device);
    let bytes = shape.iter().product::<usize>() * elem.size();
    DeviceTensor::contiguous(
        Handle::new(service, cubecl_environment::stream::StreamId { value: 0 }, bytes as u64),
        shape,
        elem,
    )
}

/// The three kernels of a problem, each with what `compile` makes of it.
fn compile_all<R>(
    problem: &Problem,
    plane: u32,
    edge: u32,
    shared: usize,
    mut compile: impl FnMut(&'static str, &dyn CubeKernel) -> R,
) -> Vec<R> {
    let limits = DeviceLimits {
        name: "offline".into(),
        max_bindings: 7,
        max_shared_bytes: shared,
        max_units: 1024,
        elements: vec![problem.element],
        max_iterations: usize::MAX,
        hardware: true,
        ptx: false,
        matrix_elements: Vec::new(),
        matrix_tf32: false,
        matrix_loads: Vec::new(),
        async_copies: false,
        cooperative: vec![(problem.element, edge as usize)],
        plane_sizes: [plane as usize; 2],
        plane_operations: true,
        wgmma: false,
    };
    let (config, _) = CmmaConfig::of(problem, &limits);
    super::check_limits(problem, &limits, config).expect("the device takes it");
    let Problem { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim, .. } = *problem;
    let elem = element_type(problem.element);
    let q = tensor(&[batch, heads_q, seq_q, head_dim], elem);
    let k = tensor(&[batch, heads_kv, seq_kv, head_dim], elem);
    let v = tensor(&[batch, heads_kv, seq_kv, value_dim], elem);
    let o = tensor(&problem.output_shape(), elem);
    let lse = tensor(&problem.lse_shape(), f32::elem_type_native());
    let bias = problem.bias.map(|shape| tensor(&shape, elem));
    let bias = || bias.as_ref().map(DeviceTensor::arg);
    let layout = Layout::of(problem, Some(Partials::default()));
    let scratch = tensor(&[layout.words], u32::elem_type_native());
    let count = || CubeCount::Static(1, 1, 1);
    let dim = |tile: CmmaTile| CubeDim::new_2d(tile.plane as u32, tile.planes as u32);
    let device = || properties(plane, edge);
    let target = || Arc::new(TargetProperties::default());
    let fused = crate::family::two_passes::keys_fused(problem);
    let forward = forward_kernel::create_dummy_kernel(
        device(),
        target(),
        count(),
        dim(config.forward),
        AddressType::U32,
        4,
        q.arg(),
        k.arg(),
        v.arg(),
        bias().into(),
        scratch.buffer(),
        o.buffer(),
        Some(lse.buffer()).into(),
        numbers(problem, &layout),
        problem.bias.is_some(),
        true,
        Compiled::of(problem, config.forward, false),
        elem,
    );
    let queries = backward_queries_kernel::create_dummy_kernel(
        device(),
        target(),
        count(),
        dim(config.queries),
        AddressType::U32,
        4,
        q.arg(),
        k.arg(),
        v.arg(),
        o.arg(),
        bias().into(),
        scratch.buffer(),
        Some(q.buffer()).into(),
        numbers(problem, &layout),
        problem.bias.is_some(),
        true,
        Compiled::of(problem, config.queries, true),
        elem,
    );
    let keys = backward_keys_kernel::create_dummy_kernel(
        device(),
        target(),
        count(),
        dim(config.keys),
        AddressType::U32,
        4,
        q.arg(),
        k.arg(),
        Some(v.arg()).into(),
        o.arg(),
        bias().into(),
        scratch.buffer(),
        Some(k.buffer()).into(),
        fused.then(|| v.buffer()).into(),
        numbers(problem, &layout),
        problem.bias.is_some(),
        true,
        fused,
        Compiled::of(problem, config.keys, true),
        elem,
    );
    vec![compile("forward", &forward), compile("backward_queries", &queries), compile("backward_keys", &keys)]
}

/// Plain with rows of 64 elements, and with everything that is compiled in; where the text is kept, large heads and few keys too.
fn problems(element: Element) -> Vec<Problem> {
    let problem = |d, dv| Problem::new([1, 2, 300, d], [1, 1, 333, d], [1, 1, 333, dv], element).expect("sound");
    let mut everything = problem(40, 16);
    everything.bias = Some([1, 2, 300, 333]);
    everything.alibi = true;
    everything.softcap = Some(20.0);
    everything.dropout = Some(crate::dropout::Dropout { probability: 0.1, seed: 1 });
    let mut problems = vec![problem(64, 64), everything];
    if folder().is_some() {
        let mut few = problem(16, 16);
        few.seq_kv = 7;
        problems.extend([few, problem(128, 128), problem(256, 192)]);
    }
    problems
}

/// Where the text is kept.
fn folder() -> Option<String> {
    std::env::var("FLASHOVER_KERNELS_DUMP").ok()
}

fn dump(name: &str, extension: &str, bytes: &[u8]) {
    if let Some(folder) = folder() {
        std::fs::write(format!("{folder}/{name}.{extension}"), bytes).expect("a folder that can be written to");
    }
}

fn vulkan_options() -> cubecl::WgpuCompilationOptions {
    let mut options = cubecl::WgpuCompilationOptions::default();
    options.supports_vulkan_compiler = true;
    options.vulkan.supports_explicit_smem = true;
    options.vulkan.supports_uniform_standard_layout = true;
    options.vulkan.max_spirv_version = (1, 6);
    options.vulkan.max_vector_size = 4;
    options.vulkan.push_constant_size = 128;
    options
}

#[test]
fn vulkan_compiles_them() {
    // One element type a problem, unless the text is kept.
    for (x, problem) in [Element::F16, Element::BF16].into_iter().enumerate().flat_map(|(x, element)| {
        let problems = problems(element).into_iter().enumerate();
        problems.filter(move |(y, _)| folder().is_some() || x == *y)
    }) {
        for shared in if folder().is_some() { vec![32 << 10, 64 << 10] } else { vec![32 << 10] } {
            compile_all(&problem, 32, 16, shared, |name, kernel| {
                let mut compiler = cubecl_spirv::SpirvCompiler;
                let compiled = compiler.compile(kernel.define(), &vulkan_options()).expect("it compiles");
                let text = compiled.to_string();
                for instruction in ["OpCooperativeMatrixLoadKHR", "MulAddKHR", "OpCooperativeMatrixStoreKHR"] {
                    assert!(text.contains(instruction), "{name}: no {instruction}");
                }
                assert!(compiled.shared_size <= shared, "{name}: {} bytes of shared memory", compiled.shared_size);
                assert!(compiled.bindings.len() <= 8, "{name}: {} bindings", compiled.bindings.len());
                let bytes: Vec<u8> = compiled.assembled_module.iter().flat_map(|word| word.to_le_bytes()).collect();
                dump(&format!("{name}-{}-{x}-{shared}", problem.element.name()), "spv", &bytes);
            });
        }
    }
}

fn cpp<T: target::CppTarget>(kernel: &dyn CubeKernel, plane: u32, wmma: Option<AmdWmma>) -> String
where
    CppCompiler<T>: Compiler<CompilationOptions = CompilationOptions>,
    <CppCompiler<T> as Compiler>::Representation: core::fmt::Display,
{
    let options = CompilationOptions {
        warp_size: plane as usize,
        supports_features: CppSupportedFeatures::default(),
        amd_wmma: wmma,
    };
    let compiled = CppCompiler::<T>::default().compile(kernel.define(), &options).expect("it compiles");
    compiled.to_string()
}

#[test]
fn rocm_compiles_them() {
    for (generation, wmma, element) in
        [("rdna3", AmdWmma::Rdna3, Element::F16), ("rdna4", AmdWmma::Rdna4, Element::BF16)]
    {
        for (x, problem) in problems(element).iter().enumerate() {
            compile_all(problem, 32, 16, 64 << 10, |name, kernel| {
                let text = cpp::<target::Hip>(kernel, 32, Some(wmma));
                assert!(text.contains("rocwmma::mma_sync"), "{name}: no matrices");
                dump(&format!("{name}-{}-{x}-{generation}", element.name()), "hip", text.as_bytes());
            });
        }
    }
}

#[test]
fn metal_compiles_them() {
    for (x, problem) in problems(Element::F16).iter().enumerate() {
        compile_all(problem, 32, 8, 32 << 10, |name, kernel| {
            let text = cpp::<target::Metal>(kernel, 32, None);
            assert!(text.contains("simdgroup_multiply_accumulate"), "{name}: no matrices");
            dump(&format!("{name}-{x}"), "metal", text.as_bytes());
        });
    }
}
