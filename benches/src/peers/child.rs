//! A contestant in a process of its own, so that one that hangs or dies takes nobody with it: requests and answers are a
//! JSON object a line, as `peers.py` describes them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::contestant::{Contestant, Pass, Spec};

/// What a process is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    Load { case: Spec },
    Results { pass: Pass, path: PathBuf },
    Time { pass: Pass, calls: usize },
    Judge { pass: Pass, path: PathBuf },
}

/// What it answers; the first answer, unasked, says who it is.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Answer {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub about: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ms: Option<f64>,
    /// By tensor: the largest error, and that of the naive reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errors: Option<BTreeMap<String, [f64; 2]>>,
}

/// Answers requests on stdin for a contestant of this process.
pub fn serve(contestant: &mut dyn Contestant, about: &str) {
    let say = |answer: &Answer| {
        let mut out = std::io::stdout().lock();
        let line = serde_json::to_string(answer).expect("an answer is plain data");
        // Nobody is left to tell if nobody listens.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    };
    say(&Answer { about: Some(about.into()), ..Answer::default() });
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let answer = match serde_json::from_str(&line) {
            Ok(Request::Load { case }) => contestant.load(&case).map(|()| Answer::default()),
            Ok(Request::Results { pass, path }) => contestant.results(pass, &path).map(|()| Answer::default()),
            Ok(Request::Time { pass, calls }) => {
                contestant.milliseconds(pass, calls).map(|ms| Answer { ms: Some(ms), ..Answer::default() })
            }
            Ok(Request::Judge { .. }) => Err("only peers.py judges".into()),
            Err(error) => Err(format!("expected a request, got {line:?} ({error})")),
        };
        say(&answer.unwrap_or_else(|error| Answer { error: Some(error), ..Answer::default() }));
    }
}

/// A contestant's process. It is started again with the next case after it hung or died, and never asked again for a pass
/// in which it did.
pub struct Child {
    name: &'static str,
    command: Vec<OsString>,
    /// Where its stderr goes.
    log: PathBuf,
    limit: Duration,
    process: Option<Process>,
    /// Passes in which it hung or died.
    hung: Vec<Pass>,
}

struct Process {
    child: std::process::Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    about: Option<String>,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Child {
    /// Starts the process; its greeting is read with the first answer. Each answer has `limit` to come.
    pub fn start(name: &'static str, command: Vec<OsString>, folder: &Path, limit: Duration) -> Result<Self, String> {
        let log = folder.join(format!("{name}.log"));
        let mut child = Child { name, command, log, limit, process: None, hung: Vec::new() };
        child.process = Some(child.spawn()?);
        Ok(child)
    }

    /// What the process says it is: versions of libraries.
    pub fn about(&mut self) -> Result<String, String> {
        self.greet(Instant::now() + self.limit)?;
        Ok(self.process.as_ref().and_then(|process| process.about.clone()).unwrap_or_default())
    }

    /// Largest errors of results in a file, by tensor, and those of the naive reference.
    pub fn judge(&mut self, pass: Pass, path: &Path) -> Result<BTreeMap<String, [f64; 2]>, String> {
        let answer = self.ask(&Request::Judge { pass, path: path.to_path_buf() })?;
        answer.errors.ok_or_else(|| format!("{}: expected errors, got another answer", self.name))
    }

    fn spawn(&self) -> Result<Process, String> {
        let program = self.command[0].to_string_lossy().into_owned();
        let log = File::create(&self.log).map_err(|error| format!("creating {}: {error}", self.log.display()))?;
        let mut child = Command::new(&self.command[0])
            .args(&self.command[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(|error| format!("{}: starting {program}: {error}", self.name))?;
        let stdin = child.stdin.take().expect("piped");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || out.lines().map_while(Result::ok).all(|line| sender.send(line).is_ok()));
        Ok(Process { child, stdin, lines, about: None })
    }

    fn ask(&mut self, request: &Request) -> Result<Answer, String> {
        let deadline = Instant::now() + self.limit;
        self.greet(deadline)?;
        let line = serde_json::to_string(request).expect("a request is plain data");
        if let Some(process) = &mut self.process
            && writeln!(process.stdin, "{line}").and_then(|()| process.stdin.flush()).is_err()
        {
            return Err(self.ended());
        }
        let answer = self.next(deadline)?;
        match answer.error {
            Some(error) => Err(format!("{}: {error}", self.name)),
            None => Ok(answer),
        }
    }

    /// Reads the greeting, unless it was read before.
    fn greet(&mut self, deadline: Instant) -> Result<(), String> {
        if self.process.as_ref().is_some_and(|process| process.about.is_some()) {
            return Ok(());
        }
        let greeting = self.next(deadline)?;
        match (greeting.error, &mut self.process) {
            (None, Some(process)) => {
                process.about = Some(greeting.about.unwrap_or_default());
                Ok(())
            }
            (error, _) => {
                self.process = None;
                Err(format!("{}: {}", self.name, error.unwrap_or_default()))
            }
        }
    }

    /// The next line that is an answer; what else a library prints is passed over.
    fn next(&mut self, deadline: Instant) -> Result<Answer, String> {
        loop {
            let Some(process) = &self.process else { return Err(format!("{}: it is not running", self.name)) };
            match process.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => match serde_json::from_str(&line) {
                    Ok(answer) => return Ok(answer),
                    Err(_) => continue,
                },
                Err(RecvTimeoutError::Timeout) => {
                    self.process = None;
                    return Err(format!("{}: no answer within {} s", self.name, self.limit.as_secs()));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
            }
        }
    }

    /// Why the process is gone: the last thing that it said.
    fn ended(&mut self) -> String {
        let status = self.process.take().and_then(|mut process| process.child.wait().ok());
        let status = status.map_or("unknown status".to_string(), |status| status.to_string());
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        format!("{}: its process ended ({status}): {last}", self.name)
    }

    /// Asks about a pass, unless the process hung or died in it before.
    fn ask_about(&mut self, pass: Pass, request: &Request) -> Result<Answer, String> {
        if self.hung.contains(&pass) {
            return Err(format!(
                "{}: not asked again, it hung or died in the {} of another case",
                self.name,
                pass.name()
            ));
        }
        let answer = self.ask(request);
        if answer.is_err() && self.process.is_none() {
            self.hung.push(pass);
        }
        answer
    }
}

impl Contestant for Child {
    fn name(&self) -> &'static str {
        self.name
    }

    fn load(&mut self, spec: &Spec) -> Result<(), String> {
        if self.process.is_none() {
            self.process = Some(self.spawn()?);
        }
        self.ask(&Request::Load { case: spec.clone() }).map(drop)
    }

    fn results(&mut self, pass: Pass, path: &Path) -> Result<(), String> {
        self.ask_about(pass, &Request::Results { pass, path: path.to_path_buf() }).map(drop)
    }

    fn milliseconds(&mut self, pass: Pass, calls: usize) -> Result<f64, String> {
        let answer = self.ask_about(pass, &Request::Time { pass, calls })?;
        answer.ms.ok_or_else(|| format!("{}: expected milliseconds, got {answer:?}", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::super::pattern::Pattern;
    use super::*;

    fn spec() -> Spec {
        Spec { batch: 1, heads: 1, seq: 1, dim: 8, pattern: Pattern::Full, element: "f16".into() }
    }

    fn shell(name: &'static str, script: &str) -> Child {
        let command = ["sh", "-c", script].map(OsString::from).to_vec();
        Child::start(name, command, &std::env::temp_dir(), Duration::from_secs(5)).expect("a shell")
    }

    #[test]
    fn requests_are_what_the_script_reads() {
        let text = |request| serde_json::to_string(&request).expect("plain data");
        assert_eq!(
            text(Request::Time { pass: Pass::ForwardBackward, calls: 3 }),
            r#"{"op":"time","pass":"forward_backward","calls":3}"#
        );
        assert_eq!(
            text(Request::Load { case: spec() }),
            r#"{"op":"load","case":{"batch":1,"heads":1,"seq":1,"dim":8,"pattern":{"kind":"full"},"element":"f16"}}"#
        );
        let judged: Answer = serde_json::from_str(r#"{"errors": {"o": [0.5, 0.25]}}"#).expect("an answer");
        assert_eq!(judged.errors.expect("errors")["o"], [0.5, 0.25]);
    }

    #[test]
    fn answers_come_in_order_and_chatter_is_passed_over() {
        let mut child = shell(
            "talker",
            r#"echo warming up; echo '{"about": "a shell"}'; read line; echo '{}'; read line; echo busy; echo '{"ms": 2.5}'"#,
        );
        assert_eq!(child.about(), Ok("a shell".into()));
        child.load(&spec()).expect("an answer");
        assert_eq!(child.milliseconds(Pass::Forward, 1), Ok(2.5));
    }

    #[test]
    fn who_dies_says_why_and_starts_again() {
        let mut child =
            shell("mortal", r#"echo '{"about": ""}'; read line; echo '{}'; read line; echo 'no memory' >&2; exit 3"#);
        child.load(&spec()).expect("an answer");
        let message = child.milliseconds(Pass::Backward, 1).expect_err("it died");
        assert_eq!(message, "mortal: its process ended (exit status: 3): no memory");
        assert_eq!(child.milliseconds(Pass::Forward, 1).expect_err("gone"), "mortal: it is not running");
        child.load(&spec()).expect("a new process");
    }

    #[test]
    fn who_hangs_is_ended_and_not_asked_again() {
        let command =
            ["sh", "-c", r#"echo '{"about": ""}'; read line; echo '{}'; sleep 100"#].map(OsString::from).to_vec();
        let mut child =
            Child::start("sleeper", command, &std::env::temp_dir(), Duration::from_secs(1)).expect("a shell");
        child.load(&spec()).expect("an answer");
        assert_eq!(child.milliseconds(Pass::Forward, 1).expect_err("it hangs"), "sleeper: no answer within 1 s");
        child.load(&spec()).expect("a new process");
        let message = child.milliseconds(Pass::Forward, 1).expect_err("not asked");
        assert_eq!(message, "sleeper: not asked again, it hung or died in the forward of another case");
    }

    #[test]
    fn what_cannot_start_is_named() {
        let command = vec![OsString::from("/no/such/python")];
        let message = Child::start("fa2", command, &std::env::temp_dir(), Duration::from_secs(1)).err().expect("none");
        assert!(message.starts_with("fa2: starting /no/such/python: "), "{message}");
        let mut child = shell("judge", r#"echo '{"error": "PyTorch is missing"}'; exit 1"#);
        assert_eq!(child.about(), Err("judge: PyTorch is missing".into()));
    }
}
