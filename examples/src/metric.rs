//! Bits per byte: the loss in nats divided by ln 2, which is what a compressor built on the model would need.

use std::sync::Arc;

use burn::backend::ExecutionError;
use burn::tensor::{Tensor, TensorReadError};
use burn::train::metric::state::{FormatOptions, NumericMetricState};
use burn::train::metric::{
    Adaptor, ItemLazy, LossInput, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes,
    NumericEntry, SerializedEntry,
};

/// The name of [`BitsPerByte`].
pub const BITS_PER_BYTE: &str = "Bits per byte";

/// What a step gives to the metrics.
pub struct StepOutput {
    /// Mean loss of a byte in nats, `[1]`.
    pub loss: Tensor<1>,
    /// Bytes that were predicted.
    pub bytes: usize,
}

impl ItemLazy for StepOutput {
    fn sync(self) -> Result<Self, ExecutionError> {
        self.loss.device().flush()?;
        Ok(StepOutput { loss: self.loss.without_autodiff(), bytes: self.bytes })
    }
}

impl Adaptor<LossInput> for StepOutput {
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone())
    }
}

impl Adaptor<BitsPerByteInput> for StepOutput {
    fn adapt(&self) -> BitsPerByteInput {
        BitsPerByteInput { loss: self.loss.clone(), bytes: self.bytes }
    }
}

/// Input of [`BitsPerByte`].
pub struct BitsPerByteInput {
    loss: Tensor<1>,
    bytes: usize,
}

/// Mean bits per byte, weighted by bytes.
#[derive(Clone, Default)]
pub struct BitsPerByte {
    state: NumericMetricState,
}

impl BitsPerByte {
    /// The metric.
    pub fn new() -> Self {
        Self::default()
    }

    fn format(&self) -> FormatOptions {
        FormatOptions::new(self.name()).precision(3)
    }
}

impl Metric for BitsPerByte {
    type Input = BitsPerByteInput;

    fn name(&self) -> MetricName {
        Arc::new(BITS_PER_BYTE.to_string())
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes { unit: None, higher_is_better: false }.into()
    }

    fn update(&mut self, input: &Self::Input, _metadata: &MetricMetadata) -> Result<SerializedEntry, TensorReadError> {
        let nats = input.loss.clone().try_into_scalar::<f64>()?;
        self.state.update(nats / std::f64::consts::LN_2, input.bytes);
        Ok(self.state.compute_update(self.format()))
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(self.state.compute_final(self.format()))
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl Numeric for BitsPerByte {
    fn value(&self) -> Option<NumericEntry> {
        Some(self.state.current_value())
    }

    fn running_value(&self) -> Option<NumericEntry> {
        Some(self.state.running_value())
    }

    fn final_value(&self) -> NumericEntry {
        self.state.final_value()
    }
}
