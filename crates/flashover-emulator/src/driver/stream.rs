//! Streams and events. Neither has anything to wait for: what was asked for before is done.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::device::current;
use super::handle::{Handle, Handles, Out};
use super::status::Status::{self, InvalidHandle, InvalidValue};
use super::status::{Answer, alive, driver};

/// `CU_EVENT_DISABLE_TIMING`
const NO_TIME: u32 = 2;
/// `CU_STREAM_LEGACY` and `CU_STREAM_PER_THREAD`, which exist without having been created, as does 0.
const DEFAULTS: [Handle; 3] = [0, 1, 2];

struct Stream {
    flags: u32,
    priority: i32,
}

struct Event {
    flags: u32,
    /// When it was last recorded.
    recorded: Mutex<Option<Instant>>,
}

impl Event {
    fn time(&self) -> Option<Instant> {
        *self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

static STREAMS: Handles<Stream> = Handles::new(0x51);
static EVENTS: Handles<Event> = Handles::new(0xe1);

/// Fails when this is no stream, or the context is lost.
pub(super) fn check(stream: Handle) -> Answer {
    alive()?;
    if DEFAULTS.contains(&stream) { Ok(()) } else { STREAMS.get(stream).map(|_| ()) }
}

fn create(out: Out<Handle>, flags: u32, priority: i32) -> Answer {
    current()?;
    if flags > 1 {
        return Err(InvalidValue);
    }
    out.put(STREAMS.add(Stream { flags, priority: priority.clamp(-5, 0) }))
}

fn elapsed(out: Out<f32>, start: Handle, end: Handle) -> Answer {
    alive()?;
    let time = |event: Handle| -> Result<Instant, Status> {
        let event = EVENTS.get(event)?;
        event.time().filter(|_| event.flags & NO_TIME == 0).ok_or(InvalidHandle)
    };
    let (start, end) = (time(start)?, time(end)?);
    let sign = if start <= end { 1.0 } else { -1.0 };
    let between = end.saturating_duration_since(start) + start.saturating_duration_since(end);
    out.put(sign * between.as_secs_f32() * 1e3)
}

driver! {
    fn cuStreamCreate(out: Out<Handle>, flags: u32) {
        create(out, flags, 0)
    }

    fn cuStreamCreateWithPriority(out: Out<Handle>, flags: u32, priority: i32) {
        create(out, flags, priority)
    }

    fn cuStreamDestroy_v2(stream: Handle) {
        STREAMS.remove(stream)?;
        alive()
    }

    fn cuStreamSynchronize(stream: Handle) {
        check(stream)
    }

    fn cuStreamQuery(stream: Handle) {
        check(stream)
    }

    fn cuStreamGetFlags(stream: Handle, out: Out<u32>) {
        check(stream)?;
        out.put(STREAMS.get(stream).map_or(0, |stream| stream.flags))
    }

    fn cuStreamGetPriority(stream: Handle, out: Out<i32>) {
        check(stream)?;
        out.put(STREAMS.get(stream).map_or(0, |stream| stream.priority))
    }

    /// Nothing is ever captured.
    fn cuStreamIsCapturing(stream: Handle, out: Out<u32>) {
        check(stream)?;
        out.put(0)
    }

    fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: u32) {
        check(stream)?;
        EVENTS.get(event).map(|_| ())
    }

    fn cuEventCreate(out: Out<Handle>, flags: u32) {
        current()?;
        out.put(EVENTS.add(Event { flags, recorded: Mutex::new(None) }))
    }

    fn cuEventDestroy_v2(event: Handle) {
        EVENTS.remove(event)?;
        alive()
    }

    fn cuEventRecord(event: Handle, stream: Handle) {
        check(stream)?;
        let event = EVENTS.get(event)?;
        *event.recorded.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        Ok(())
    }

    fn cuEventSynchronize(event: Handle) {
        alive()?;
        EVENTS.get(event).map(|_| ())
    }

    fn cuEventQuery(event: Handle) {
        alive()?;
        EVENTS.get(event).map(|_| ())
    }

    fn cuEventElapsedTime(out: Out<f32>, start: Handle, end: Handle) {
        elapsed(out, start, end)
    }

    fn cuEventElapsedTime_v2(out: Out<f32>, start: Handle, end: Handle) {
        elapsed(out, start, end)
    }
}
