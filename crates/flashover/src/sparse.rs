//! [`SparsePlan`]: a block plan as attention takes it, made once and used in any number of calls.

use std::fmt;
use std::sync::Arc;

use burn::tensor::{Bool, Tensor};
use flashover_kernels::block_plan::{BlockPlan, PlanShape, TileSize};
use flashover_kernels::mask::{Extent, Mask, MaskError};
use flashover_kernels::problem::Problem;

use crate::AttentionError;

/// A block plan for [`AttentionOptions::plan`](crate::AttentionOptions::plan): which tiles of keys each tile of queries
/// visits, and the points of those that are not visible whole.
///
/// Clones share everything, what lies on devices included: a device gets the plan with the first call there, and every later
/// call, forward or backward, reads it where it lies. Keep one as long as mask, lengths and heads stay.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use flashover::kernels::mask::Mask;
/// use flashover::{AttentionOptions, SparsePlan, attention};
///
/// let mask = Mask::causal() & (Mask::sliding_window(256) | Mask::sinks(16));
/// let plan = SparsePlan::new(&mask, [1, 8, 1024, 1024])?;
/// let q = Tensor::<4>::zeros([1, 8, 1024, 64], &Device::flex());
/// let o = attention(q.clone(), q.clone(), q, &AttentionOptions::new().plan(&plan))?;
/// assert!(plan.block_plan().density() < 0.5);
/// # Ok::<(), flashover::AttentionError>(())
/// ```
#[derive(Clone)]
pub struct SparsePlan(Arc<Inner>);

struct Inner {
    plan: BlockPlan,
    /// Visible points, over the plan's own batch elements and heads.
    points: u64,
    /// The plan on the devices that have asked for it.
    #[cfg(feature = "cubecl-backend")]
    on_devices: std::sync::Mutex<Vec<(burn_cubecl::CubeDevice, flashover_kernels::device::DeviceTensor)>>,
}

impl SparsePlan {
    /// Queries and keys of a tile that every kernel walks well.
    pub const TILE: TileSize = TileSize { bq: 128, bk: 128 };

    /// The exact plan of a mask over `[B, Hq, Sq, Skv]`, in tiles of [`TILE`](Self::TILE).
    ///
    /// # Errors
    ///
    /// As [`BlockPlan::new`].
    pub fn new(mask: &Mask, shape: [usize; 4]) -> Result<Self, AttentionError> {
        SparsePlan::with_tile(mask, shape, Self::TILE)
    }

    /// [`new`](Self::new) in tiles of any size. On a GPU tiles must be multiples of the kernel's: of 32 queries and keys, and
    /// better of 64. The CPU takes any, and is best from 64 on.
    ///
    /// # Errors
    ///
    /// As [`BlockPlan::new`].
    pub fn with_tile(mask: &Mask, shape: [usize; 4], tile: TileSize) -> Result<Self, AttentionError> {
        // Lengths that do not fit are refused as too long.
        let [batch, heads, seq_q, seq_kv] = shape.map(|n| n.try_into().unwrap_or(u32::MAX));
        let plan = BlockPlan::new(mask, Extent { batch, heads, seq_q, seq_kv }, tile)?;
        Ok(plan.refine().into())
    }

    /// The exact plan of a boolean tensor in Burn's convention, `true` hides: `[B, Hq, Sq, Skv]`, `B` and `Hq` possibly 1.
    /// Reads the tensor back from its device.
    ///
    /// # Errors
    ///
    /// As [`BlockPlan::from_dense`].
    pub fn from_tensor(mask: Tensor<4, Bool>, tile: TileSize) -> Result<Self, AttentionError> {
        let shape = mask.dims().map(|n| n.try_into().unwrap_or(u32::MAX));
        let visible: Vec<bool> = mask.into_data().iter::<bool>().map(|hides| !hides).collect();
        Ok(BlockPlan::from_dense(shape, &visible, tile)?.refine().into())
    }

    /// The plan on the host.
    pub fn block_plan(&self) -> &BlockPlan {
        &self.0.plan
    }

    /// Holds the plan against a problem's lengths, batch and heads; what the problem will know of it.
    pub(crate) fn shape_for(&self, problem: &Problem) -> Result<PlanShape, MaskError> {
        let plan = &self.0.plan;
        plan.check_problem(problem)?;
        Ok(plan.shape(self.0.points, [problem.batch, problem.heads_q]))
    }

    /// The plan as kernels read it: u32 `[words]`, uploaded at the first call for the device.
    #[cfg(feature = "cubecl-backend")]
    pub(crate) fn on_device(
        &self,
        client: &cubecl::client::Client,
        device: &burn_cubecl::CubeDevice,
    ) -> flashover_kernels::device::DeviceTensor {
        use cubecl::prelude::*;
        use flashover_kernels::device::DeviceTensor;

        let mut known = self.0.on_devices.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, words)) = known.iter().find(|(known, _)| known == device) {
            return words.clone();
        }
        let words = self.0.plan.to_words();
        let handle = client.create_from_slice(u32::as_bytes(&words));
        let words = DeviceTensor::contiguous(handle, &[words.len()], u32::elem_type_native());
        known.push((device.clone(), words.clone()));
        words
    }
}

impl From<BlockPlan> for SparsePlan {
    fn from(plan: BlockPlan) -> Self {
        SparsePlan(Arc::new(Inner {
            points: plan.points(),
            plan,
            #[cfg(feature = "cubecl-backend")]
            on_devices: Default::default(),
        }))
    }
}

impl fmt::Debug for SparsePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SparsePlan({})", self.0.plan)
    }
}
