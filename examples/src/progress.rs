//! Progress as plain lines, for when stdout is not a terminal.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use burn::train::LearnerSummary;
use burn::train::logger::{EvaluationProgressLogger, TrainingProgressLogger};
use burn::train::metric::{MetricDefinition, MetricId};
use burn::train::renderer::{
    EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation, MetricsRendererTraining,
};

use crate::metric::BITS_PER_BYTE;

/// At most one line of a running epoch in this time.
const PAUSE: Duration = Duration::from_secs(10);

/// A line an epoch, and one every ten seconds within.
pub struct Lines {
    names: HashMap<MetricId, String>,
    epochs: usize,
    epoch: usize,
    items: usize,
    epoch_start: Instant,
    last_line: Instant,
    train: f64,
    valid: f64,
}

impl Lines {
    /// Nothing printed yet.
    pub fn new() -> Self {
        let now = Instant::now();
        Lines {
            names: HashMap::new(),
            epochs: 0,
            epoch: 0,
            items: 0,
            epoch_start: now,
            last_line: now,
            train: f64::NAN,
            valid: f64::NAN,
        }
    }

    /// The metric's value over the epoch so far, if it is bits per byte.
    fn bits_per_byte(&self, state: MetricState) -> Option<f64> {
        let MetricState::Numeric(entry, Some(value)) = state else { return None };
        let name = self.names.get(&entry.metric_id)?;
        (name == BITS_PER_BYTE).then(|| value.current())
    }
}

impl Default for Lines {
    fn default() -> Self {
        Self::new()
    }
}

impl MetricsRendererTraining for Lines {
    fn update_train(&mut self, state: MetricState) {
        self.train = self.bits_per_byte(state).unwrap_or(self.train);
    }

    fn update_valid(&mut self, state: MetricState) {
        self.valid = self.bits_per_byte(state).unwrap_or(self.valid);
    }

    fn on_train_end(&mut self, _summary: Option<LearnerSummary>) -> Result<(), Box<dyn std::error::Error>> {
        Ok(())
    }
}

impl TrainingProgressLogger for Lines {
    fn start(&mut self, total_epochs: usize, starting_epoch: usize, _items: Option<usize>, _label: Option<&str>) {
        self.epochs = total_epochs;
        self.epoch = starting_epoch;
    }

    fn start_split(&mut self, split: &str, total_items: usize) {
        self.items = total_items;
        if split.eq_ignore_ascii_case("train") {
            self.epoch_start = Instant::now();
            self.last_line = self.epoch_start;
        }
    }

    fn update_split(&mut self, items_processed: usize) {
        if self.last_line.elapsed() >= PAUSE {
            self.last_line = Instant::now();
            let (epoch, epochs, items, now) = (self.epoch, self.epochs, self.items, self.train);
            println!("  epoch {epoch}/{epochs}, window {items_processed}/{items}: {now:.3} bits per byte");
        }
    }

    fn update_epoch(&mut self, epoch: usize) {
        let seconds = self.epoch_start.elapsed().as_secs_f64();
        let (epochs, train, valid) = (self.epochs, self.train, self.valid);
        println!("epoch {epoch}/{epochs}: {train:.3} bits per byte, held out {valid:.3}, {seconds:.1} s");
        self.epoch = epoch + 1;
    }

    fn end_split(&mut self) {}

    fn end(&mut self) {}

    fn log_event_training(&mut self, _event: String) {}
}

impl EvaluationProgressLogger for Lines {
    fn start_global_progress(&mut self, _total_tests: usize) {}

    fn start_test(&mut self, _name: &str, _total_items: usize) {}

    fn update_test_progress(&mut self, _items_processed: usize) {}

    fn end_test(&mut self) {}

    fn end_global_progress(&mut self) {}

    fn log_event_evaluation(&mut self, _event: String) {}
}

impl MetricsRendererEvaluation for Lines {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
}

impl MetricsRenderer for Lines {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.names.insert(definition.metric_id, definition.name.to_string());
    }
}
