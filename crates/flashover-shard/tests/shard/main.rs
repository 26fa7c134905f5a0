//! One test binary for everything of this crate but the sweep, which is timed and wants the machine to itself.

mod closed_forms;
mod execute;
mod paper;
mod planner;
mod programs;
mod simulated;
mod transport;
