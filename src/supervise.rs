//! Who is running, who is restarted, when it is over: a state machine without processes, threads or a clock.
//!
//! A stage has one main process, whose success ends it (slab build, encoder, trainer), and possibly helpers that serve it (the loader).
//! Events and the time go in, [`Action`]s come out; [`crate::stages`] performs them. So every rule below is tested in microseconds.
//!
//! * A process that dies by a signal or with an exit code other than 64 and 65 is started again, after a pause that doubles, at most
//!   [`Policy::restarts_max`] times within [`Policy::window`]. Codes 64 and 65 (configuration, data) would come again: the stage fails. So
//!   it does after a process that said that its failure lasts (no driver).
//! * A process that is silent for [`Policy::silence_max`] is killed, and its death handled like any other.
//! * A stop is passed to the main process alone, which ends at a safe point; the helpers follow when it has ended. A second stop kills.
//! * When the main process has ended, helpers get [`Policy::wind_down_max`] to end before they are killed.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serenity_protocol::message::Role;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Code(u8),
    /// By this signal.
    Signal(i32),
}

impl Ended {
    /// The exit code that stands for it: a death by signal is an invariant broken (70).
    pub fn exit_code(self) -> u8 {
        match self {
            Ended::Code(code) => code,
            Ended::Signal(_) => 70,
        }
    }

    /// Whether the same would happen again.
    fn is_final(self) -> bool {
        matches!(self, Ended::Code(64 | 65))
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ended::Code(code) => write!(f, "ended with exit code {code}"),
            Ended::Signal(signal) => write!(f, "was killed by signal {signal}"),
        }
    }
}

/// The limits.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Restarts of one role within `window`.
    pub restarts_max: usize,
    /// See `restarts_max`.
    pub window: Duration,
    /// Pause before the first restart; each further one within the window doubles it.
    pub backoff_first: Duration,
    /// Longest pause.
    pub backoff_max: Duration,
    /// A process that says nothing for so long is hung.
    pub silence_max: Duration,
    /// Time for the others to end when the stage is over.
    pub wind_down_max: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            restarts_max: 5,
            window: Duration::from_secs(600),
            backoff_first: Duration::from_millis(250),
            backoff_max: Duration::from_secs(8),
            silence_max: Duration::from_secs(120),
            wind_down_max: Duration::from_secs(20),
        }
    }
}

/// How a stage ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The main process did its work.
    Done,
    /// It was asked to stop, and did.
    Stopped,
    /// A process ended in a way that no restart helps, or once too often.
    Failed {
        /// Which.
        role: Role,
        /// How.
        ended: Ended,
        /// Restarts that were tried.
        restarts: usize,
    },
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start the process of this role.
    Spawn(Role),
    /// Ask it to end at a safe point.
    Stop(Role),
    /// SIGKILL.
    Kill(Role),
    /// It died and will be started again; `number` restarts were needed so far, counting this one.
    Announce {
        /// Which.
        role: Role,
        /// How it ended.
        ended: Ended,
        /// Pause before the restart.
        pause: Duration,
        /// Count within the window.
        number: usize,
    },
    /// It is silent and will be killed.
    Hung(Role),
    /// No process is left; the stage is over.
    Finish(Outcome),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// To be started at this time.
    Due(Duration),
    /// Running; when it was last heard, and whether it was told to die.
    Running { heard: Duration, killed: bool },
    /// Ended, and not to be started again.
    Ended,
}

#[derive(Debug)]
struct Job {
    state: State,
    restarts: VecDeque<Duration>,
    /// The process has said that it would fail again.
    gave_up: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Working,
    /// The user asked for an end.
    Stopping,
    /// The outcome is known; the rest is ending. The deadline is for killing.
    WindingDown {
        outcome: Outcome,
        deadline: Duration,
    },
    Over,
}

/// The state of one stage. Times are durations since any fixed moment.
#[derive(Debug)]
pub struct Supervisor {
    policy: Policy,
    main: Role,
    jobs: BTreeMap<u8, (Role, Job)>,
    phase: Phase,
    pending: VecDeque<Action>,
}

fn order(role: Role) -> u8 {
    match role {
        Role::Slab => 0,
        Role::Encoder => 1,
        Role::Loader => 2,
        Role::Trainer => 3,
    }
}

impl Supervisor {
    /// A stage of `main` and its `helpers`; all are due at once, helpers first.
    pub fn new(policy: Policy, main: Role, helpers: &[Role], now: Duration) -> Self {
        let job = |role: &Role| (order(*role), (*role, Job { state: State::Due(now), restarts: VecDeque::new(), gave_up: false }));
        Self { policy, main, jobs: helpers.iter().chain([&main]).map(job).collect(), phase: Phase::Working, pending: VecDeque::new() }
    }

    /// A process of `role` runs.
    pub fn started(&mut self, role: Role, now: Duration) {
        self.set(role, State::Running { heard: now, killed: false });
    }

    /// A message of `role` came.
    pub fn heard(&mut self, role: Role, now: Duration) {
        if let Some(Job { state: State::Running { heard, .. }, .. }) = self.job(role) {
            *heard = now;
        }
    }

    /// The process of `role` said that it ends in a way that no restart helps.
    pub fn gave_up(&mut self, role: Role) {
        if let Some(job) = self.job(role) {
            job.gave_up = true;
        }
    }

    /// The process of `role` has ended (and can no longer do anything).
    pub fn exited(&mut self, role: Role, ended: Ended, now: Duration) {
        self.set(role, State::Ended);
        match self.phase {
            Phase::Working => self.exited_at_work(role, ended, now),
            Phase::Stopping if role == self.main => {
                let outcome = match ended {
                    Ended::Code(0) => Outcome::Done,
                    Ended::Code(code @ (64 | 65 | 70)) => Outcome::Failed { role, ended: Ended::Code(code), restarts: 0 },
                    _ => Outcome::Stopped,
                };
                self.wind_down(outcome, now);
            }
            // A helper that ends while others are ending is not missed.
            Phase::Stopping | Phase::WindingDown { .. } | Phase::Over => {}
        }
    }

    /// The user wants an end: the first time at a safe point, the second time at once.
    pub fn stop(&mut self, now: Duration) {
        match self.phase {
            Phase::Working if self.is_running(self.main) => {
                self.phase = Phase::Stopping;
                self.pending.push_back(Action::Stop(self.main));
            }
            Phase::Working => self.wind_down(Outcome::Stopped, now),
            Phase::Stopping => {
                self.wind_down(Outcome::Stopped, now);
                self.kill_all();
            }
            Phase::WindingDown { .. } => self.kill_all(),
            Phase::Over => {}
        }
    }

    /// What to do now; to be called after every event, and no later than [`Self::wake_at`].
    pub fn actions(&mut self, now: Duration) -> Vec<Action> {
        self.look(now);
        let mut actions: Vec<Action> = self.pending.drain(..).collect();
        if let Phase::WindingDown { outcome, .. } = self.phase
            && self.jobs.values().all(|(_, job)| job.state == State::Ended)
        {
            self.phase = Phase::Over;
            actions.push(Action::Finish(outcome));
        }
        actions
    }

    /// When something will be due although nothing happens.
    pub fn wake_at(&self) -> Option<Duration> {
        let silence = self.policy.silence_max;
        let due = |(_, job): &(Role, Job)| match job.state {
            State::Due(at) => Some(at),
            State::Running { heard, killed: false } => Some(heard + silence),
            State::Running { .. } | State::Ended => None,
        };
        let jobs = self.jobs.values().filter_map(due);
        let deadline = match self.phase {
            Phase::WindingDown { deadline, .. } => Some(deadline),
            _ => None,
        };
        jobs.chain(deadline).min()
    }

    fn job(&mut self, role: Role) -> Option<&mut Job> {
        self.jobs.get_mut(&order(role)).map(|(_, job)| job)
    }

    fn set(&mut self, role: Role, state: State) {
        if let Some(job) = self.job(role) {
            job.state = state;
        }
    }

    fn is_running(&self, role: Role) -> bool {
        self.jobs.get(&order(role)).is_some_and(|(_, job)| matches!(job.state, State::Running { .. }))
    }

    fn running(&self) -> Vec<Role> {
        self.jobs.values().map(|(role, _)| *role).filter(|role| self.is_running(*role)).collect()
    }

    fn exited_at_work(&mut self, role: Role, ended: Ended, now: Duration) {
        if role == self.main && ended == Ended::Code(0) {
            return self.wind_down(Outcome::Done, now);
        }
        let policy = self.policy;
        let Some(job) = self.job(role) else { return };
        job.restarts.retain(|at| now.saturating_sub(*at) < policy.window);
        let tried = job.restarts.len();
        if ended.is_final() || job.gave_up || tried >= policy.restarts_max {
            return self.wind_down(Outcome::Failed { role, ended, restarts: tried }, now);
        }
        let pause = policy.backoff_first.saturating_mul(1 << tried.min(20)).min(policy.backoff_max);
        job.restarts.push_back(now);
        job.state = State::Due(now + pause);
        self.pending.push_back(Action::Announce { role, ended, pause, number: tried + 1 });
    }

    fn wind_down(&mut self, outcome: Outcome, now: Duration) {
        for (_, job) in self.jobs.values_mut() {
            if matches!(job.state, State::Due(_)) {
                job.state = State::Ended;
            }
        }
        for role in self.running() {
            self.pending.push_back(Action::Stop(role));
        }
        self.phase = Phase::WindingDown { outcome, deadline: now + self.policy.wind_down_max };
    }

    fn kill_all(&mut self) {
        for role in self.running() {
            self.kill(role);
        }
    }

    fn kill(&mut self, role: Role) {
        if let Some(Job { state: State::Running { killed, .. }, .. }) = self.job(role)
            && !std::mem::replace(killed, true)
        {
            self.pending.push_back(Action::Kill(role));
        }
    }

    /// Starts what is due and kills what is hung or overdue.
    fn look(&mut self, now: Duration) {
        let mut due = Vec::new();
        let mut hung = Vec::new();
        for (role, job) in self.jobs.values() {
            match job.state {
                State::Due(at) if at <= now => due.push(*role),
                State::Running { heard, killed: false } if now >= heard + self.policy.silence_max => hung.push(*role),
                _ => {}
            }
        }
        for role in due {
            // Until `started` or `exited`: an action is given once.
            self.set(role, State::Running { heard: now, killed: false });
            self.pending.push_back(Action::Spawn(role));
        }
        for role in hung {
            self.pending.push_back(Action::Hung(role));
            self.kill(role);
        }
        if matches!(self.phase, Phase::WindingDown { deadline, .. } if now >= deadline) {
            self.kill_all();
            // Killed processes end by themselves; without this the deadline would be reported as due for ever.
            if let Phase::WindingDown { deadline, .. } = &mut self.phase {
                *deadline = now + self.policy.wind_down_max;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    const L: Role = Role::Loader;
    const T: Role = Role::Trainer;

    fn s(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    /// A training stage whose two processes run.
    fn running() -> Supervisor {
        let mut sup = Supervisor::new(Policy::default(), T, &[L], s(0.0));
        assert_eq!(sup.actions(s(0.0)), [Action::Spawn(L), Action::Spawn(T)]);
        sup.started(L, s(0.0));
        sup.started(T, s(0.0));
        assert_eq!(sup.actions(s(0.0)), []);
        sup
    }

    #[test]
    fn success_of_the_main_process_ends_the_helpers() {
        let mut sup = running();
        sup.exited(T, Ended::Code(0), s(1.0));
        assert_eq!(sup.actions(s(1.0)), [Action::Stop(L)]);
        sup.exited(L, Ended::Code(0), s(2.0));
        assert_eq!(sup.actions(s(2.0)), [Action::Finish(Outcome::Done)]);
        assert_eq!(sup.actions(s(3.0)), []);
    }

    #[test]
    fn every_death_but_64_and_65_is_restarted_after_a_growing_pause() {
        for ended in [Ended::Signal(9), Ended::Code(69), Ended::Code(70), Ended::Code(75), Ended::Code(101)] {
            for role in [L, T] {
                let mut sup = running();
                let mut now = 1.0;
                for number in 1..=5 {
                    sup.exited(role, ended, s(now));
                    let pause = s(0.25 * f64::from(1 << (number - 1)));
                    assert_eq!(sup.actions(s(now)), [Action::Announce { role, ended, pause, number }], "{ended:?}");
                    assert_eq!(sup.wake_at().unwrap(), s(now) + pause);
                    assert_eq!(sup.actions(s(now) + pause - s(0.001)), []);
                    now += pause.as_secs_f64();
                    assert_eq!(sup.actions(s(now)), [Action::Spawn(role)]);
                    sup.started(role, s(now));
                    now += 1.0;
                }
                let other = if role == L { T } else { L };
                sup.exited(role, ended, s(now));
                assert_eq!(sup.actions(s(now)), [Action::Stop(other)]);
                sup.exited(other, Ended::Code(75), s(now));
                let outcome = Outcome::Failed { role, ended, restarts: 5 };
                assert_eq!(sup.actions(s(now)), [Action::Finish(outcome)]);
            }
        }
    }

    #[test]
    fn restarts_are_counted_in_a_sliding_window_and_by_role() {
        let mut sup = running();
        for i in 0..40 {
            let now = f64::from(i) * 121.0;
            sup.heard(T, s(now));
            sup.exited(L, Ended::Signal(11), s(now));
            let actions = sup.actions(s(now));
            // Within 600 s lie at most five deaths that are 121 s apart.
            assert!(matches!(actions.as_slice(), [Action::Announce { role: L, number: 1..=5, .. }]), "{i}: {actions:?}");
            assert_eq!(sup.actions(s(now + 8.0)), [Action::Spawn(L)]);
            sup.started(L, s(now + 8.0));
        }
        // The trainer's own count is untouched.
        sup.exited(T, Ended::Signal(9), s(4800.0));
        assert!(sup.actions(s(4800.0)).contains(&Action::Announce { role: T, ended: Ended::Signal(9), pause: s(0.25), number: 1 }));
    }

    #[test]
    fn a_failure_that_lasts_is_never_restarted() {
        let mut sup = running();
        sup.gave_up(T);
        sup.exited(T, Ended::Code(69), s(1.0));
        assert_eq!(sup.actions(s(1.0)), [Action::Stop(L)]);
        sup.exited(L, Ended::Code(0), s(1.1));
        let outcome = Outcome::Failed { role: T, ended: Ended::Code(69), restarts: 0 };
        assert_eq!(sup.actions(s(1.1)), [Action::Finish(outcome)]);
    }

    #[test]
    fn bad_configuration_and_bad_data_are_never_restarted() {
        for code in [64, 65] {
            let mut sup = running();
            sup.exited(L, Ended::Code(code), s(1.0));
            assert_eq!(sup.actions(s(1.0)), [Action::Stop(T)]);
            sup.exited(T, Ended::Code(75), s(2.0));
            let outcome = Outcome::Failed { role: L, ended: Ended::Code(code), restarts: 0 };
            assert_eq!(sup.actions(s(2.0)), [Action::Finish(outcome)]);
        }
        assert_eq!((Ended::Signal(9).exit_code(), Ended::Code(65).exit_code()), (70, 65));
    }

    #[test]
    fn a_helper_that_ends_early_comes_back() {
        let mut sup = running();
        sup.exited(L, Ended::Code(0), s(1.0));
        assert!(matches!(sup.actions(s(1.0)).as_slice(), [Action::Announce { role: L, .. }]));
    }

    #[test]
    fn a_stop_waits_for_the_checkpoint_and_a_second_one_kills() {
        let mut sup = running();
        sup.stop(s(1.0));
        assert_eq!(sup.actions(s(1.0)), [Action::Stop(T)]);
        // The loader's death changes nothing while the trainer saves.
        sup.exited(L, Ended::Signal(9), s(1.5));
        assert_eq!(sup.actions(s(1.5)), []);
        sup.exited(T, Ended::Code(75), s(30.0));
        assert_eq!(sup.actions(s(30.0)), [Action::Finish(Outcome::Stopped)]);

        let mut sup = running();
        sup.stop(s(1.0));
        sup.actions(s(1.0));
        sup.stop(s(2.0));
        let actions = sup.actions(s(2.0));
        assert!(actions.contains(&Action::Kill(T)) && actions.contains(&Action::Kill(L)), "{actions:?}");
        sup.exited(T, Ended::Signal(9), s(2.1));
        sup.exited(L, Ended::Signal(9), s(2.1));
        assert_eq!(sup.actions(s(2.1)), [Action::Finish(Outcome::Stopped)]);
    }

    #[test]
    fn work_that_ends_while_stopping_counts() {
        for (ended, outcome) in [
            (Ended::Code(0), Outcome::Done),
            (Ended::Code(65), Outcome::Failed { role: T, ended: Ended::Code(65), restarts: 0 }),
            (Ended::Signal(15), Outcome::Stopped),
        ] {
            let mut sup = running();
            sup.stop(s(1.0));
            sup.actions(s(1.0));
            sup.exited(T, ended, s(2.0));
            assert_eq!(sup.actions(s(2.0)), [Action::Stop(L)]);
            sup.exited(L, Ended::Code(0), s(2.1));
            assert_eq!(sup.actions(s(2.1)), [Action::Finish(outcome)]);
        }
    }

    #[test]
    fn a_stop_between_death_and_restart_starts_nothing() {
        let mut sup = running();
        sup.exited(T, Ended::Signal(9), s(1.0));
        sup.actions(s(1.0));
        sup.stop(s(1.1));
        assert_eq!(sup.actions(s(9.0)), [Action::Stop(L)]);
        sup.exited(L, Ended::Code(0), s(9.0));
        assert_eq!(sup.actions(s(9.0)), [Action::Finish(Outcome::Stopped)]);
    }

    #[test]
    fn silence_is_a_hang_and_any_message_ends_it() {
        let mut sup = running();
        sup.heard(T, s(100.0));
        sup.heard(L, s(100.0));
        assert_eq!(sup.actions(s(219.0)), []);
        sup.heard(L, s(219.0));
        assert_eq!(sup.actions(s(220.0)), [Action::Hung(T), Action::Kill(T)]);
        assert_eq!(sup.actions(s(221.0)), [], "killed once");
        sup.exited(T, Ended::Signal(9), s(221.0));
        assert!(matches!(sup.actions(s(221.0)).as_slice(), [Action::Announce { role: T, .. }]));
    }

    #[test]
    fn helpers_that_do_not_end_are_killed() {
        let mut sup = running();
        sup.exited(T, Ended::Code(0), s(1.0));
        assert_eq!(sup.actions(s(1.0)), [Action::Stop(L)]);
        assert_eq!(sup.wake_at(), Some(s(21.0)));
        sup.heard(L, s(20.0));
        assert_eq!(sup.actions(s(21.0)), [Action::Kill(L)]);
        assert!(sup.wake_at().is_none_or(|at| at > s(21.0)));
        sup.exited(L, Ended::Signal(9), s(21.5));
        assert_eq!(sup.actions(s(21.5)), [Action::Finish(Outcome::Done)]);
    }
}
