//! Runs what was selected.

use cubecl::client::Client;

use super::{Kernel, OnePassBackward, Selection};
use crate::device::{DeviceTensor, KernelError};
use crate::family::Outputs;
use crate::operands::{Gradients, Operands, Wanted};
use crate::problem::Problem;
use crate::{cmma, hopper, mma, portable};

/// A problem on a device.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    /// Whose memory the tensors are in.
    pub client: &'a Client,
    /// The problem that a kernel was selected for.
    pub problem: &'a Problem,
    /// Its operands.
    pub operands: &'a Operands<DeviceTensor>,
    /// The words of its block plan, if it has one.
    pub plan: Option<&'a DeviceTensor>,
}

impl Selection {
    /// Whether the forward reads q, k and v by the copy engine, so that they must be as [`hopper::reads_in_place`] says.
    pub fn forward_copies(&self) -> bool {
        self.kernel == Kernel::Hopper
    }

    /// Whether the backward of these gradients reads q, k, v and do by the copy engine; `with_rest` says that the forward kept what
    /// rounding took from its output.
    pub fn backward_copies(&self, wanted: Wanted, with_rest: bool) -> bool {
        with_rest && wanted.operands_together() && matches!(self.one_pass, Some(OnePassBackward::Hopper(_)))
    }

    /// The output, the log-sum-exp if it is wanted, and what rounding took from the output if that is (only the kernels with a backward
    /// in one pass keep it).
    ///
    /// # Errors
    /// When operands are not those of the problem that this was selected for.
    pub fn forward(
        &self,
        Call { client, problem, operands, plan }: Call<'_>,
        with_lse: bool,
        with_rest: bool,
    ) -> Result<(DeviceTensor, Option<DeviceTensor>, Option<DeviceTensor>), KernelError> {
        let without_rest = |(o, lse)| (o, lse, None);
        match self.kernel {
            Kernel::Portable => {
                portable::forward(client, problem, operands, plan, with_lse, self.config).map(without_rest)
            }
            Kernel::Mma => mma::forward(client, problem, operands, plan, with_lse, with_rest, own(self.mma)),
            Kernel::Cmma => cmma::forward(client, problem, operands, plan, with_lse, own(self.cmma)).map(without_rest),
            Kernel::Hopper => hopper::forward(client, problem, operands, plan, with_lse, with_rest, own(self.hopper)),
        }
    }

    /// The gradients that are wanted. `rest` is what rounding took from the output, if the forward kept it.
    ///
    /// # Errors
    /// When operands or outputs are not those of the problem that this was selected for.
    pub fn backward(
        &self,
        Call { client, problem, operands, plan }: Call<'_>,
        outputs: &Outputs,
        rest: Option<DeviceTensor>,
        wanted: Wanted,
    ) -> Result<Gradients<DeviceTensor>, KernelError> {
        let portable = |wanted| portable::backward(client, problem, operands, outputs, plan, wanted, self.config);
        let in_one_pass = self.one_pass.zip(rest).filter(|_| wanted.operands_together());
        let of = match (self.kernel, in_one_pass) {
            (Kernel::Portable, _) => return portable(wanted),
            (Kernel::Cmma, _) => {
                cmma::backward(client, problem, operands, outputs, plan, wanted.operands(), own(self.cmma))?
            }
            (Kernel::Mma | Kernel::Hopper, Some((OnePassBackward::Hopper(tiles), rest))) => {
                hopper::backward(client, problem, operands, outputs, plan, rest, tiles)?
            }
            (Kernel::Mma | Kernel::Hopper, Some((OnePassBackward::Mma(of), rest))) => {
                mma::backward_one_pass(client, problem, operands, outputs, plan, rest, of)?
            }
            (Kernel::Mma | Kernel::Hopper, None) => {
                mma::backward(client, problem, operands, outputs, plan, wanted.operands(), own(self.mma))?
            }
        };
        // Only the portable kernels take other gradients than those of q, k and v.
        match wanted.parameters() {
            rest if rest.is_empty() => Ok(of),
            rest => Ok(Gradients { q: of.q, k: of.k, v: of.v, ..portable(rest)? }),
        }
    }
}

fn own<T>(tiles: Option<T>) -> T {
    tiles.expect("a family is selected with its tiles")
}
