//! Tensors on a device, what the device can do, and why a kernel cannot run on it.

use std::sync::atomic::{AtomicBool, Ordering};

use cubecl::ir::FloatKind;
use cubecl::ir::features::{MmaConfig, Plane, Tma, TypeUsage};
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::problem::{Element, Precision};

/// A tensor on a device as CubeCL knows it: memory, shape and strides in elements. Any strides are read in place: 0 in
/// expanded dimensions, swapped dimensions, slices.
#[derive(Debug, Clone)]
pub struct DeviceTensor {
    /// The memory, offset included.
    pub handle: Handle,
    /// Size of each dimension.
    pub shape: Vec<usize>,
    /// Elements between neighbours of each dimension.
    pub strides: Vec<usize>,
    /// Element type in memory.
    pub elem: ElemType,
}

/// Whether new tensors start as NaN.
static POISON: AtomicBool = AtomicBool::new(false);

/// From now on, outputs and scratch memory of all launches start as NaN, so that a test sees what a kernel did not write.
#[doc(hidden)]
pub fn poison_new_tensors() {
    POISON.store(true, Ordering::Relaxed);
}

impl DeviceTensor {
    /// A tensor whose elements lie in row-major order.
    pub fn contiguous(handle: Handle, shape: &[usize], elem: ElemType) -> Self {
        let mut strides = vec![1; shape.len()];
        for d in (1..shape.len()).rev() {
            strides[d - 1] = strides[d] * shape[d].max(1);
        }
        DeviceTensor { handle, shape: shape.to_vec(), strides, elem }
    }

    /// Whether its elements lie one behind the other, the last dimension's first. An empty tensor's do.
    pub fn is_contiguous(&self) -> bool {
        let strides = DeviceTensor::contiguous(self.handle.clone(), &self.shape, self.elem).strides;
        self.elements() == 0 || strides == self.strides
    }

    /// A contiguous tensor of unspecified content.
    pub fn empty(client: &Client, shape: &[usize], elem: ElemType) -> Self {
        let bytes = shape.iter().product::<usize>() * elem.size();
        let handle = if POISON.load(Ordering::Relaxed) {
            // All bits set is NaN in every element type.
            client.create_from_slice(&vec![u8::MAX; bytes])
        } else {
            client.empty(bytes)
        };
        Self::contiguous(handle, shape, elem)
    }

    /// A contiguous tensor of zeros.
    pub fn zeros(client: &Client, shape: &[usize], elem: ElemType) -> Self {
        let elements: usize = shape.iter().product();
        // All bits zero is 0 in every element type.
        Self::contiguous(client.create_from_slice(&vec![0u8; elements * elem.size()]), shape, elem)
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The tensor as a kernel's argument; dimensions of size 1 get the stride 0, so that an index of the broadcast
    /// shape finds its element.
    pub(crate) fn arg(&self) -> TensorArg {
        let strides = self.strides.iter().zip(&self.shape).map(|(&stride, &size)| if size == 1 { 0 } else { stride });
        let strides: Vec<usize> = strides.collect();
        // SAFETY: shape and strides are the tensor's own, which its backend vouches for.
        unsafe { TensorArg::from_raw_parts(self.handle.clone(), strides.into(), self.shape.clone().into()) }
    }

    /// The contiguous tensor as a flat buffer.
    pub(crate) fn buffer(&self) -> BufferArg {
        // SAFETY: contiguous tensors are made here, with as many elements as their shape says.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.elements()) }
    }

    /// How wide indices into this tensor are.
    pub(crate) fn address_type(&self) -> AddressType {
        AddressType::from_len(self.handle.size_in_used() as usize / self.elem.size())
    }
}

/// CubeCL's name of an element type.
pub fn element_type(element: Element) -> ElemType {
    ElemType::Float(match element {
        Element::F64 => FloatKind::F64,
        Element::F32 => FloatKind::F32,
        Element::F16 => FloatKind::F16,
        Element::BF16 => FloatKind::BF16,
    })
}

/// Iterations after which Mesa's software GPU ends all loops of a unit.
const SOFTWARE_ITERATIONS: usize = 65_535;

/// What a device offers, as far as the choice of a kernel depends on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Name of the runtime.
    pub name: String,
    /// Storage buffers that a kernel may bind, CubeCL's own not counted.
    pub max_bindings: usize,
    /// Shared memory of a cube, in bytes.
    pub max_shared_bytes: usize,
    /// Units of a cube.
    pub max_units: usize,
    /// Element types that it stores and computes with.
    pub elements: Vec<Element>,
    /// Times that a unit may go around loops: more than anything runs, except on software GPUs.
    pub max_iterations: usize,
    /// Whether it is a real GPU: one that a driver compiles unrolled loops for in reasonable time.
    pub hardware: bool,
    /// Whether kernels may hold PTX: an NVIDIA GPU by CUDA's own compiler.
    pub ptx: bool,
    /// Element types that it multiplies in blocks of 16×8×16, summing in f32, with registers that the kernel fills itself.
    pub matrix_elements: Vec<Element>,
    /// Whether it multiplies blocks of 16×8×8 of tf32 likewise.
    pub matrix_tf32: bool,
    /// Element types of matrices that it loads from shared memory into such registers.
    pub matrix_loads: Vec<Element>,
    /// Whether it copies to shared memory while it computes.
    pub async_copies: bool,
    /// Element types of which it multiplies cooperative matrices, summing in f32, and rows, columns and depth of these: 16, or 8.
    pub cooperative: Vec<(Element, usize)>,
    /// Units of its smallest and of its largest plane.
    pub plane_sizes: [usize; 2],
    /// Whether units of a plane vote and exchange values.
    pub plane_operations: bool,
    /// Whether it is a Hopper GPU: the copy engine, and products of warpgroups (`wgmma`), which no later GPU has.
    pub wgmma: bool,
}

impl DeviceLimits {
    /// The limits of a client's device.
    pub fn of(client: &Client) -> Self {
        let properties = client.properties();
        let usable = |element: &Element| {
            let usage = properties.type_usage(element_type(*element));
            usage.contains(TypeUsage::Buffer) && usage.contains(TypeUsage::Conversion)
        };
        let elements = [Element::F32, Element::F16, Element::BF16];
        let hardware = &properties.hardware;
        let real = hardware.plane_size_max >= 32;
        let features = &properties.features;
        let multiplied = |element: &Element| {
            let (a_type, cd_type) = (element_type(*element), element_type(Element::F32));
            features.matmul.mma.contains(&MmaConfig { a_type, b_type: a_type, cd_type, m: 16, n: 8, k: 16 })
        };
        let (tf32, f32) = (ElemType::Float(FloatKind::TF32), element_type(Element::F32));
        let of_tf32 = MmaConfig { a_type: tf32, b_type: tf32, cd_type: f32, m: 16, n: 8, k: 8 };
        let cooperative = |edge: u32| {
            elements.into_iter().filter_map(move |element| {
                let (a_type, cd_type) = (element_type(element), element_type(Element::F32));
                let (m, n, k) = (edge, edge, edge);
                let has = features.matmul.cmma.contains(&MmaConfig { a_type, b_type: a_type, cd_type, m, n, k });
                has.then_some((element, edge as usize))
            })
        };
        let loaded = |element: &Element| features.matmul.ldmatrix.contains(&element_type(*element));
        DeviceLimits {
            name: client.name().to_string(),
            // CubeCL has already taken off the one for the shapes and scalars that it passes.
            max_bindings: hardware.max_bindings as usize,
            max_shared_bytes: hardware.max_shared_memory_size,
            max_units: hardware.max_units_per_cube as usize,
            elements: elements.into_iter().filter(usable).collect(),
            max_iterations: if real { usize::MAX } else { SOFTWARE_ITERATIONS },
            hardware: real,
            ptx: client.name() == "cuda",
            matrix_elements: elements.into_iter().filter(multiplied).collect(),
            matrix_tf32: features.matmul.mma.contains(&of_tf32),
            matrix_loads: elements.into_iter().filter(loaded).collect(),
            async_copies: features.copy_async,
            cooperative: cooperative(16).chain(cooperative(8)).collect(),
            plane_sizes: [hardware.plane_size_min, hardware.plane_size_max].map(|size| size as usize),
            plane_operations: features.plane.contains(Plane::Ops),
            wgmma: features.tma.contains(Tma::Base) && properties.identity.fingerprint == "ptx_sm90",
        }
    }
}

impl DeviceLimits {
    /// Rows, columns and depth of the largest cooperative matrices of an element type that sum in f32.
    pub fn cooperative_edge(&self, element: Element) -> Option<usize> {
        self.cooperative.iter().filter(|(of, _)| *of == element).map(|(_, edge)| *edge).max()
    }
}

/// Why a kernel was not launched. Each message gives what was expected and what came.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The device does not have the element type.
    #[error("element type: expected one of {expected:?} on {device}, got {found:?}")]
    Element {
        /// What the device has.
        expected: Vec<Element>,
        /// The device.
        device: String,
        /// The element type of the problem.
        found: Element,
    },
    /// A kernel multiplies elements of f32 at another precision only.
    #[error("{kernel} kernel: expected f32 at precision {expected:?}, got precision {found:?}")]
    Precision {
        /// The kernel.
        kernel: &'static str,
        /// The precision that it has.
        expected: Precision,
        /// The problem's.
        found: Precision,
    },
    /// A kernel needs more of something than the device has.
    #[error("{kernel} kernel: expected at most {limit} {what} on {device}, it needs {found}")]
    Limit {
        /// The kernel.
        kernel: &'static str,
        /// Of what.
        what: &'static str,
        /// The device.
        device: String,
        /// What there is.
        limit: usize,
        /// What is needed.
        found: usize,
    },
    /// A kernel needs something that the device does not have.
    #[error("{kernel} kernel: expected {what}, which {device} does not have")]
    Feature {
        /// The kernel.
        kernel: &'static str,
        /// What is missing.
        what: &'static str,
        /// The device.
        device: String,
    },
    /// A head dimension that the kernel does not take.
    #[error("{kernel} kernel: expected a {what} dimension that is a multiple of {multiple}, got {found}")]
    HeadDim {
        /// The kernel.
        kernel: &'static str,
        /// `head` or `value`.
        what: &'static str,
        /// What it must be a multiple of.
        multiple: usize,
        /// What came.
        found: usize,
    },
    /// A tensor that the kernel cannot read where it lies.
    #[error("{operand}: expected rows without gaps at multiples of 16 bytes, got strides {found:?}")]
    Layout {
        /// The operand.
        operand: &'static str,
        /// Its strides in elements.
        found: Vec<usize>,
    },
    /// A plan whose tiles the kernel's tiles do not divide.
    #[error(
        "plan: expected tiles of a multiple of {expected:?} queries and keys for the {kernel} kernel, got {found:?}"
    )]
    PlanTile {
        /// The kernel.
        kernel: &'static str,
        /// Its tile.
        expected: [u32; 2],
        /// Queries and keys of the plan's tiles.
        found: [u32; 2],
    },
    /// A kernel that has no form for the problem.
    #[error("{kernel} kernel: expected a problem without {what}")]
    Form {
        /// The kernel.
        kernel: &'static str,
        /// What the problem has.
        what: &'static str,
    },
    /// Tiles that were made for another problem.
    #[error("{kernel} kernel: expected tiles for {expected}, got {found}")]
    Tiles {
        /// The kernel.
        kernel: &'static str,
        /// The problem's tiles.
        expected: String,
        /// What came.
        found: String,
    },
    /// An operand is not what the problem says.
    #[error("{operand}: expected shape {expected:?}, got {found:?}")]
    Shape {
        /// The operand.
        operand: &'static str,
        /// Its shape by the problem.
        expected: Vec<usize>,
        /// The shape that came.
        found: Vec<usize>,
    },
    /// An operand has another element type than the problem says.
    #[error("{operand}: expected elements of type {expected}, got {found}")]
    OperandElement {
        /// The operand.
        operand: &'static str,
        /// What was expected.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// The problem has an option whose operand is absent, or the other way round.
    #[error("{operand}: expected {expected}, got {found}")]
    Presence {
        /// The operand.
        operand: &'static str,
        /// `a tensor` or `none`.
        expected: &'static str,
        /// `a tensor` or `none`.
        found: &'static str,
    },
}
