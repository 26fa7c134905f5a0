//! Training with burn-train: resumed where the last run stopped, ended when its time is up.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use burn::grad_clipping::GradientClippingConfig;
use burn::lr_scheduler::noam::NoamLrSchedulerConfig;
use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::tensor::Device;
use burn::train::checkpoint::KeepLastNCheckpoints;
use burn::train::metric::LossMetric;
use burn::train::metric::store::EventStoreClient;
use burn::train::{EarlyStoppingStrategy, Learner, LearnerSummary, SupervisedTraining};

use crate::Result;
use crate::data::{self, Corpus};
use crate::metric::{BITS_PER_BYTE, BitsPerByte};
use crate::model::ByteModel;
use crate::progress::Lines;
use crate::run_dir::RunConfig;

/// Held-out windows of an epoch's validation.
const VALID_WINDOWS: usize = 128;

/// How long to train.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// The epoch that is done already; 0 for none.
    pub from: usize,
    /// Epochs to add.
    pub epochs: usize,
    /// No epoch is begun that would end after this time.
    pub limit: Duration,
    /// Lines instead of burn-train's terminal display.
    pub plain: bool,
}

/// Trains, writes checkpoints and logs into `directory`, and returns the model for inference.
///
/// # Errors
///
/// If burn-train reports one.
pub fn train(directory: &Path, config: &RunConfig, corpus: &Corpus, span: Span, device: &Device) -> Result<ByteModel> {
    let RunConfig { batch, steps, seed, .. } = *config;
    let context = config.model.context;
    let autodiff = device.clone().autodiff();
    autodiff.seed(seed);
    let model = config.model.init(&autodiff);
    println!("Model: {} parameters, {context} bytes of context.", model.num_params());

    // Another seed after every resume: the run goes on with windows that it has not just seen.
    let epoch_seed = seed + span.from as u64;
    let train = data::train_loader(&corpus.train, context, batch, steps, epoch_seed, &autodiff);
    let valid = data::valid_loader(&corpus.valid, context, batch, VALID_WINDOWS, device);
    let optimizer = AdamWConfig::new()
        .with_beta_2(0.95)
        .with_epsilon(1e-8)
        .with_weight_decay(0.05)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(1.0)))
        .init();

    let limit = TimeLimit::new(span);
    let mut training = SupervisedTraining::new(directory, train, valid)
        .metrics((LossMetric::new(), BitsPerByte::new()))
        .num_epochs(span.from + span.epochs)
        .with_default_checkpointers()
        .with_checkpointing_strategy(KeepLastNCheckpoints::new(2))
        .early_stopping(limit.clone());
    if span.from > 0 {
        training = training.checkpoint(span.from);
    }
    if span.plain || !std::io::stdout().is_terminal() {
        training = training.renderer(Box::new(Lines::new()));
    }
    let result = training.launch(Learner::new(model, optimizer, schedule(config)?));
    // The terminal display gives the screen back when it is dropped.
    drop(result.renderer);
    if let Some(error) = result.error {
        return Err(format!("training: {error}").into());
    }
    if let Some(epoch) = limit.stopped.get() {
        println!(
            "Stopped after epoch {epoch}: another would pass the time limit of {:.0} s.",
            span.limit.as_secs_f64()
        );
    }
    if let Some(interruption) = result.interrupted {
        println!("Stopped: {}.", interruption.reason.as_deref().unwrap_or("interrupted"));
    }
    Ok(result.model)
}

/// Warm-up, then a decay with the square root of the step: it needs no last step, so that a resumed run goes on with it.
fn schedule(config: &RunConfig) -> Result<burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler> {
    let width = config.model.d_model;
    let factor = config.learning_rate * ((width * config.warm_up) as f64).sqrt();
    Ok(NoamLrSchedulerConfig::new(factor).with_warmup_steps(config.warm_up).with_model_size(width).init()?)
}

/// Stops after an epoch if the next one would take too long.
#[derive(Clone)]
struct TimeLimit {
    span: Span,
    start: Instant,
    /// The epoch after which it stopped; clones share it.
    stopped: Arc<OnceLock<usize>>,
}

impl TimeLimit {
    fn new(span: Span) -> Self {
        TimeLimit { span, start: Instant::now(), stopped: Arc::default() }
    }
}

impl EarlyStoppingStrategy for TimeLimit {
    fn should_stop(&mut self, epoch: usize, _store: &EventStoreClient) -> bool {
        let done = (epoch - self.span.from) as u32;
        let elapsed = self.start.elapsed();
        let stop = done < self.span.epochs as u32 && elapsed + elapsed / done > self.span.limit;
        stop && self.stopped.set(epoch).is_ok()
    }
}

/// Loss and bits per byte of every epoch that `directory` has logs of, as a table.
///
/// # Errors
///
/// If there are no logs.
pub fn history(directory: &Path) -> Result<String> {
    let summary = LearnerSummary::new(directory, &["Loss", BITS_PER_BYTE])?;
    let column = |metrics: &[burn::train::MetricSummary], name: &str, epoch: usize| {
        let entries = metrics.iter().find(|metric| metric.name == name).map(|metric| &metric.entries);
        entries
            .and_then(|entries| entries.iter().find(|entry| entry.step == epoch))
            .map_or(f64::NAN, |entry| entry.value)
    };
    let mut table = String::from(
        "        train                    held out\n\
         epoch   loss (nats)  bits/byte   loss (nats)  bits/byte\n",
    );
    for epoch in 1..=summary.epochs {
        let [train, valid] = [&summary.metrics.train, &summary.metrics.valid]
            .map(|metrics| ["Loss", BITS_PER_BYTE].map(|name| column(metrics, name, epoch)));
        table += &format!("{epoch:5}   {:11.3}  {:9.3}   {:11.3}  {:9.3}\n", train[0], train[1], valid[0], valid[1]);
    }
    Ok(table)
}
