//! Medians of alternating runs.

use std::time::Instant;

/// Milliseconds that `work` takes.
pub fn milliseconds<R>(work: impl FnOnce() -> R) -> (R, f64) {
    let start = Instant::now();
    let result = work();
    (result, start.elapsed().as_secs_f64() * 1e3)
}

/// Runs each of `contestants` once unmeasured, then all of them in turn `repeats` times, and returns the medians of
/// what they report.
pub fn interleaved<const N: usize>(repeats: usize, mut contestants: [&mut dyn FnMut() -> f64; N]) -> [f64; N] {
    for contestant in &mut contestants {
        contestant();
    }
    let mut samples = [const { Vec::new() }; N];
    for _ in 0..repeats {
        for (contestant, samples) in contestants.iter_mut().zip(&mut samples) {
            samples.push(contestant());
        }
    }
    samples.map(median)
}

/// The middle sample, or the mean of the two in the middle.
pub fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    if samples.len() % 2 == 1 { samples[middle] } else { (samples[middle - 1] + samples[middle]) / 2.0 }
}
