//! Attention as a Burn user calls it, Burn's own or ours, on the default device of the build: a contestant that runs in a
//! process of its own, because Burn's tuning can hang.

use std::path::Path;
use std::time::Instant;

use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Device, Tensor, TensorData};
use flashover::AttentionOptions;
use flashover::kernels::problem::Element;

use super::contestant::{Contestant, Pass, Spec, write_judged};
use super::operands::{Folder, NAMES};
use super::pattern::Pattern;

/// Whose attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    Burn,
    Flashover,
}

/// See the module.
pub struct Tensors {
    library: Library,
    device: Device,
    folder: Folder,
    call: Option<Call>,
}

struct Call {
    spec: Spec,
    /// q, k, v and do, without autodiff.
    plain: [Tensor<4>; 4],
    /// The same with autodiff, q, k and v tracked.
    tracked: [Tensor<4>; 4],
}

impl Tensors {
    /// Attention of a library over the operands of a folder.
    pub fn new(library: Library, folder: Folder) -> Self {
        Tensors { library, device: Device::default(), folder, call: None }
    }

    fn call(&self) -> Result<&Call, String> {
        self.call.as_ref().ok_or_else(|| "no case was loaded".to_string())
    }

    fn attend(&self, pattern: Pattern, [q, k, v, _]: &[Tensor<4>; 4]) -> Result<Tensor<4>, String> {
        let (q, k, v) = (q.clone(), k.clone(), v.clone());
        let causal = pattern == Pattern::Causal;
        match self.library {
            Library::Burn => {
                let options = AttentionModuleOptions { is_causal: causal, ..Default::default() };
                Ok(burn::tensor::module::attention(q, k, v, None, None, options))
            }
            Library::Flashover => {
                let options = AttentionOptions::new();
                let options = if causal { options.causal() } else { options };
                flashover::attention(q, k, v, &options).map_err(|error| error.to_string())
            }
        }
    }

    fn sync(&self) {
        self.device.sync().expect("the device answers");
    }
}

/// The gradients of q, k and v for the gradient `do` of the output.
fn gradients(o: Tensor<4>, operands: &[Tensor<4>; 4]) -> Result<[Tensor<4>; 3], String> {
    let [q, k, v, do_] = operands;
    let store = (o * do_.clone()).sum().backward();
    let of = |x: &Tensor<4>| x.grad(&store).ok_or_else(|| "expected a gradient of each operand".to_string());
    Ok([of(q)?, of(k)?, of(v)?])
}

fn bytes(tensor: Tensor<4>) -> Vec<u8> {
    tensor.into_data().as_bytes().to_vec()
}

impl Contestant for Tensors {
    fn name(&self) -> &'static str {
        match self.library {
            Library::Burn => "burn",
            Library::Flashover => "flashover",
        }
    }

    fn load(&mut self, spec: &Spec) -> Result<(), String> {
        self.call = None;
        if !matches!(spec.pattern, Pattern::Full | Pattern::Causal) {
            return Err("called with nothing masked and causal only; under plans the kernels are called by name".into());
        }
        let (element, shape) = (spec.problem()?.element, [spec.batch, spec.heads, spec.seq, spec.dim]);
        let dtype = if element == Element::F16 { DType::F16 } else { DType::BF16 };
        let mut data = Vec::new();
        for name in NAMES {
            let bytes = self.folder.read(name, element, spec.elements())?;
            data.push(TensorData::from_bytes_vec(bytes, shape, dtype));
        }
        let on = |device: &Device| -> [Tensor<4>; 4] {
            std::array::from_fn(|n| Tensor::from_data(data[n].clone(), (device, dtype)))
        };
        let [q, k, v, do_] = on(&self.device.clone().autodiff());
        let tracked = [q.require_grad(), k.require_grad(), v.require_grad(), do_];
        self.call = Some(Call { spec: spec.clone(), plain: on(&self.device), tracked });
        Ok(())
    }

    fn results(&mut self, pass: Pass, path: &Path) -> Result<(), String> {
        let call = self.call()?;
        let tensors = if pass == Pass::Forward {
            vec![bytes(self.attend(call.spec.pattern, &call.plain)?)]
        } else {
            let o = self.attend(call.spec.pattern, &call.tracked)?;
            let gradients = gradients(o.clone(), &call.tracked)?;
            [o].into_iter().chain(gradients).map(bytes).collect()
        };
        write_judged(path, &call.spec, &tensors)
    }

    /// Of a backward alone each call is waited for, since its forward comes between.
    fn milliseconds(&mut self, pass: Pass, calls: usize) -> Result<f64, String> {
        let call = self.call()?;
        self.sync();
        let mut waited = 0.0;
        let start = Instant::now();
        for _ in 0..calls {
            match pass {
                Pass::Forward => drop(self.attend(call.spec.pattern, &call.plain)?),
                Pass::ForwardBackward => {
                    drop(gradients(self.attend(call.spec.pattern, &call.tracked)?, &call.tracked)?);
                }
                Pass::Backward => {
                    let o = self.attend(call.spec.pattern, &call.tracked)?;
                    self.sync();
                    let start = Instant::now();
                    drop(gradients(o, &call.tracked)?);
                    self.sync();
                    waited += start.elapsed().as_secs_f64() * 1e3;
                }
            }
        }
        self.sync();
        Ok(if pass == Pass::Backward { waited } else { start.elapsed().as_secs_f64() * 1e3 })
    }
}
