//! The devices that tests run on, and how a test says that it cannot run.

use burn::tensor::Device;

// Only where WGSL is compiled for Vulkan: SPIR-V asks for more than what is granted everywhere, Metal is no Vulkan.
#[cfg(all(feature = "webgpu", not(any(feature = "vulkan", feature = "metal"))))]
#[path = "limited.rs"]
pub mod limited;

/// The native CPU.
pub fn flex() -> Device {
    Device::flex()
}

/// Every backend of the build that composes attention of its own operations.
// Burn deprecates NdArray and LibTorch; as long as it has them, they are tested.
#[allow(deprecated)]
pub fn chunked() -> Vec<(&'static str, Device)> {
    vec![
        #[cfg(feature = "ndarray")]
        ("ndarray", Device::ndarray()),
        #[cfg(feature = "tch")]
        ("tch", Device::libtorch()),
        #[cfg(all(feature = "remote-server", feature = "remote-websocket"))]
        ("remote", remote()),
    ]
}

/// A client's device of a server in this process, over the loopback, which computes on the native CPU.
#[cfg(all(feature = "remote-server", feature = "remote-websocket"))]
pub fn remote() -> Device {
    use burn::remote::RemoteHost;
    use burn::server::{RemoteServer, WebSocketTransport};

    static ADDRESS: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let address = ADDRESS.get_or_init(|| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = format!("ws://{}", listener.local_addr().expect("a bound socket"));
        let server = RemoteServer::new([flex()]);
        std::thread::spawn(move || server.serve(WebSocketTransport::from_listener(listener)));
        address
    });
    Device::remote_options(&RemoteHost::websocket(address)).init().expect("the server answers")
}

/// The GPU of the build, a software one if need be; under WebGPU one that has no more than what is granted everywhere.
/// `None` in a build without one.
#[allow(unreachable_code)]
pub fn gpu() -> Option<Device> {
    #[cfg(feature = "cuda")]
    return Some(Device::cuda(0));
    #[cfg(feature = "rocm")]
    return Some(Device::rocm(0));
    #[cfg(all(feature = "webgpu", not(any(feature = "vulkan", feature = "metal"))))]
    return Some(limited::limited());
    #[cfg(any(feature = "vulkan", feature = "metal"))]
    return Some(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice));
    None
}

/// The devices that run kernels of ours.
pub fn native() -> Vec<Device> {
    [Some(flex()), gpu()].into_iter().flatten().collect()
}

/// Notes that a test, or a part of it, was skipped. CI compares the notes with `.ci/skips.txt`.
pub fn skip(name: &str, reason: &str) {
    eprintln!("skipped {name}: {reason}");
    if let Ok(path) = std::env::var("FLASHOVER_SKIPS") {
        use std::io::Write;
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(&path).expect("FLASHOVER_SKIPS");
        writeln!(file, "{name}: {reason}").expect("FLASHOVER_SKIPS");
    }
}
