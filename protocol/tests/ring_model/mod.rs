//! A world for the ring's state machines: memory that can end a role before or after any operation and let another role run in the middle
//! of it, a virtual clock, futexes that lose or delay wake-ups, payloads that rot, processes that are stopped for a while, and a launcher
//! that starts again what has died, and dies itself.
//!
//! What runs is the production core ([`Producer`], [`Consumer`]); this file replaces only what is around it: the mapped words, the
//! kernel, and the driver loops of `loader/src/service.rs` and `trainer/src/ring_source.rs`. Every choice comes from one seed or from a
//! fixed plan, so a failure replays.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::{Rc, Weak};

use serenity_protocol::ring::consumer::{Consumer, Leased};
use serenity_protocol::ring::producer::{Action, Catalogue, Job, Producer};
use serenity_protocol::ring::words::{ChunkId, Descriptor, Shape, ShareWord, SlotWord, State, Words, consumer, loader, slot, unpack_epoch};

pub const SIGNATURE: u64 = 77;
/// Jobs that the loader has under way at most (its workers).
const JOBS_MAX: usize = 3;
/// Ticks that a sleep on a futex lasts at most: the 100 ms of the segment.
const SLEEP_MAX: u64 = 50;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Loader,
    Consumer(usize),
    /// Starts the others again; has no part in the memory.
    Launcher,
}

impl Role {
    /// Place in tables of processes.
    fn number(self) -> usize {
        match self {
            Role::Loader => 0,
            Role::Consumer(index) => index + 1,
            Role::Launcher => panic!("the launcher has no memory"),
        }
    }
}

/// Mistakes that a core or a driver could have; each must be caught (see `every_seeded_bug_is_caught`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    None,
    /// The loader's epoch is not compared: a replaced loader goes on.
    MissingEpochCheck,
    /// The consumer gives a slot back before it has read it.
    EarlyFree,
    /// The loader overwrites a slot that is not free.
    WrongVictim,
    /// A sleeper takes its ticket after it has looked, and sleeps without limit.
    LostWake,
    /// Payloads are not compared with their checksums.
    ChecksumNotCompared,
    /// A slot counts as free when the first of its consumers has released it.
    FreedByTheFirst,
}

/// What may happen at a memory operation, counted over both roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    CrashBefore(u64),
    CrashAfter(u64),
    /// Another role takes a whole step before the operation.
    Preempt(u64),
}

/// Thrown through a role's code to end it where it stands.
struct Crash;

pub struct Dice(Cell<u64>);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(Cell::new(seed.wrapping_add(0x1234_5678).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1))
    }
    pub fn roll(&self, sides: u64) -> u64 {
        let mut x = self.0.get();
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.0.set(x);
        (x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides
    }
}

/// The payload checksum that the right bytes have.
pub fn payload_of(content: ChunkId) -> u64 {
    content.pack().wrapping_mul(0x9e37_79b9) | 1
}

/// The shared words as one role sees them.
pub struct Memory {
    world: Weak<World>,
    role: Role,
    /// The loader's epoch as it was when this process took the role, for the seeded bug.
    epoch: Cell<u64>,
    bug: Bug,
}

/// Counts and chances of a world.
#[derive(Debug, Clone, Copy)]
pub struct Chances {
    /// One step in so many ends in a crash at one of its operations; 0 = never.
    pub crash: u64,
    /// One operation in so many lets the other role run first; 0 = never.
    pub preempt: u64,
    /// One wake-up in so many is lost, one in so many late; 0 = never.
    pub wake: u64,
    /// One step in so many flips a bit of a payload in the ring; 0 = never.
    pub rot: u64,
    /// One step of the launcher in so many is its last; 0 = never.
    pub orphan: u64,
    /// Steps are chosen by dice; else the roles take turns and do everything in order, and what dies is back at its next turn.
    pub random: bool,
}

/// A wait on a futex: until its time is over or a wake-up takes it away.
struct Sleep {
    until: u64,
}

struct Loader {
    producer: Option<Producer<Memory>>,
    jobs: VecDeque<Job>,
    sleep: Option<Sleep>,
}

struct Trainer {
    ring: Option<Consumer<Memory>>,
    leases: VecDeque<(Leased, u64)>,
    backlog: VecDeque<u16>,
    wanted: VecDeque<ChunkId>,
    sleep: Option<Sleep>,
}

impl Loader {
    fn dead() -> Self {
        Self { producer: None, jobs: VecDeque::new(), sleep: None }
    }
}

impl Trainer {
    fn dead() -> Self {
        Self { ring: None, leases: VecDeque::new(), backlog: VecDeque::new(), wanted: VecDeque::new(), sleep: None }
    }
}

pub struct World {
    pub shape: Shape,
    catalogue: Catalogue,
    words: Vec<Cell<u64>>,
    /// What a reader of each slot's bytes would find: their checksum; `None` = half written.
    bytes: Vec<Cell<Option<u64>>>,
    pub dice: Dice,
    chances: Cell<Chances>,
    bug: Bug,
    loader: RefCell<Option<Loader>>,
    trainers: Vec<RefCell<Option<Trainer>>>,
    zombie_loader: RefCell<Option<Loader>>,
    zombie_trainers: Vec<RefCell<Option<Trainer>>>,
    /// Whether each process lives, and so holds its role lock.
    living: Vec<Cell<bool>>,
    /// Epoch of each living consumer that has attached, else 0.
    epochs: Vec<Cell<u16>>,
    /// A consumer that takes no step (stopped by a signal, say), and is not started again should it be dead.
    pub stopped: Cell<Option<usize>>,
    launcher_lives: Cell<bool>,
    /// When the launcher starts each dead process again.
    restart_at: Vec<Cell<Option<u64>>>,
    /// For the seeded bug: slots that some consumer has released since they were filled.
    released: Vec<Cell<bool>>,
    /// Set while a zombie runs: it may not change a word.
    frozen: Cell<bool>,
    depth: Cell<u32>,
    clock: Cell<u64>,
    /// What each life of the trainer asks for, in order (fixed plans), or empty: dice.
    script: Vec<u16>,
    posting: Cell<bool>,
    /// Operations so far; at this one the running role crashes.
    pub ops: Cell<u64>,
    crash_at: Vec<Cell<Option<u64>>>,
    pub events: Vec<Event>,
    pub crashes: Cell<u64>,
    pub delivered: Cell<u64>,
    pub rotten_noticed: Cell<u64>,
    rotten: Cell<u64>,
}

impl World {
    pub fn new(shape: Shape, chunks: Vec<u16>, seed: u64, chances: Chances, bug: Bug, script: Vec<u16>, events: Vec<Event>) -> Rc<Self> {
        let words: Vec<Cell<u64>> = (0..shape.words()).map(|_| Cell::new(0)).collect();
        shape.format(&RawWords(&words));
        let each = 0..shape.consumers;
        Rc::new(Self {
            catalogue: Catalogue { chunks, signature: SIGNATURE },
            words,
            bytes: (0..shape.slots).map(|_| Cell::new(None)).collect(),
            shape,
            dice: Dice::new(seed),
            chances: Cell::new(chances),
            bug,
            loader: RefCell::new(Some(Loader::dead())),
            trainers: each.clone().map(|_| RefCell::new(Some(Trainer::dead()))).collect(),
            zombie_loader: RefCell::new(None),
            zombie_trainers: each.clone().map(|_| RefCell::new(None)).collect(),
            living: (0..=shape.consumers).map(|_| Cell::new(false)).collect(),
            epochs: each.map(|_| Cell::new(0)).collect(),
            stopped: Cell::new(None),
            launcher_lives: Cell::new(true),
            restart_at: (0..=shape.consumers).map(|_| Cell::new(None)).collect(),
            released: (0..shape.slots).map(|_| Cell::new(false)).collect(),
            frozen: Cell::new(false),
            depth: Cell::new(0),
            clock: Cell::new(0),
            script,
            posting: Cell::new(true),
            ops: Cell::new(0),
            crash_at: (0..=shape.consumers).map(|_| Cell::new(None)).collect(),
            events,
            crashes: Cell::new(0),
            delivered: Cell::new(0),
            rotten_noticed: Cell::new(0),
            rotten: Cell::new(0),
        })
    }

    fn memory(self: &Rc<Self>, role: Role) -> Memory {
        let epoch = Cell::new(self.words[loader::EPOCH].get());
        Memory { world: Rc::downgrade(self), role, epoch, bug: self.bug }
    }

    fn one_in(&self, sides: u64) -> bool {
        sides > 0 && self.dice.roll(sides) == 0
    }

    /// One step of `role`: what its process would do between two looks at the shared words.
    pub fn step(self: &Rc<Self>, role: Role) {
        self.clock.set(self.clock.get() + 1);
        if role == Role::Launcher {
            return self.launcher_step();
        }
        let chances = self.chances.get();
        if self.stopped.get().is_some_and(|index| role == Role::Consumer(index)) || !self.is_up(role) {
            return;
        }
        let doomed = self.one_in(chances.crash);
        if doomed {
            self.crash_at[role.number()].set(Some(self.ops.get() + 1 + self.dice.roll(40)));
        }
        // Without its launcher a process soon ends by itself, between two steps.
        let ends = !self.launcher_lives.get() && self.dice.roll(8) == 0;
        match role {
            Role::Launcher => {}
            Role::Loader => {
                let Some(mut state) = self.loader.take() else { return };
                let alive = !ends && survives(|| self.loader_step(&mut state));
                let state = self.bury_loader(state, alive && !self.struck(role, doomed));
                *self.loader.borrow_mut() = Some(state);
            }
            Role::Consumer(index) => {
                let Some(mut state) = self.trainers[index].take() else { return };
                let alive = !ends && survives(|| self.trainer_step(index, &mut state));
                let state = self.bury_trainer(index, state, alive && !self.struck(role, doomed));
                *self.trainers[index].borrow_mut() = Some(state);
            }
        }
    }

    /// Whether the process is there to take a step. In a fixed plan a dead one is back at once.
    fn is_up(&self, role: Role) -> bool {
        let living = &self.living[role.number()];
        if !self.chances.get().random {
            living.set(true);
        }
        living.get()
    }

    /// Starts what is dead after a while; dies now and then, and is started again by the user.
    fn launcher_step(&self) {
        if !self.launcher_lives.get() {
            self.launcher_lives.set(self.dice.roll(4) == 0);
            return;
        }
        if self.one_in(self.chances.get().orphan) {
            self.launcher_lives.set(false);
            self.restart_at.iter().for_each(|at| at.set(None));
            return;
        }
        let left_alone = self.stopped.get().map(|index| index + 1);
        let processes = self.living.iter().zip(&self.restart_at).enumerate();
        for (_, (living, at)) in processes.filter(|(number, (living, _))| !living.get() && Some(*number) != left_alone) {
            match at.get() {
                Some(at) if at > self.clock.get() => {}
                // The process is there, and has its lock, from now on; it attaches in its own first step.
                Some(_) => {
                    at.set(None);
                    living.set(true);
                }
                None => at.set(Some(self.clock.get() + self.dice.roll(30))),
            }
        }
    }

    /// A doomed step that was too short for its crash ends in one all the same.
    fn struck(&self, role: Role, doomed: bool) -> bool {
        doomed && self.crash_at[role.number()].take().is_some()
    }

    /// A dead loader's state, or now and then a zombie: a process that was given up though it lives.
    fn bury_loader(&self, state: Loader, alive: bool) -> Loader {
        if alive {
            return state;
        }
        self.crashes.set(self.crashes.get() + 1);
        self.living[0].set(false);
        if self.chances.get().random && self.dice.roll(4) == 0 {
            *self.zombie_loader.borrow_mut() = Some(state);
        }
        Loader::dead()
    }

    fn bury_trainer(&self, index: usize, state: Trainer, alive: bool) -> Trainer {
        if alive {
            return state;
        }
        self.crashes.set(self.crashes.get() + 1);
        self.living[index + 1].set(false);
        self.epochs[index].set(0);
        if self.chances.get().random && self.dice.roll(4) == 0 {
            *self.zombie_trainers[index].borrow_mut() = Some(state);
        }
        Trainer::dead()
    }

    fn loader_step(self: &Rc<Self>, state: &mut Loader) {
        let Some(producer) = &mut state.producer else {
            let mut producer = Producer::attach(self.memory(Role::Loader), self.shape, self.catalogue.clone()).unwrap();
            for (index, _, payload) in producer.ready_slots().unwrap() {
                if self.bytes[index].get() != Some(payload) && self.bug != Bug::ChecksumNotCompared {
                    self.rotten_noticed.set(self.rotten_noticed.get() + 1);
                    producer.drop_ready(index).unwrap();
                } else {
                    producer.confirm(index);
                }
            }
            state.producer = Some(producer);
            return;
        };
        self.bury_the_dead(producer);
        let finish = if self.chances.get().random { self.dice.roll(2) == 0 } else { state.sleep.is_some() };
        if !state.jobs.is_empty() && (finish || state.jobs.len() > JOBS_MAX) {
            let pick = if self.chances.get().random { self.dice.roll(state.jobs.len() as u64) as usize } else { 0 };
            let job = state.jobs.remove(pick).unwrap();
            self.bytes[job.slot].set(Some(payload_of(job.content)));
            producer.publish(job, 8, payload_of(job.content)).unwrap();
            self.wake(Role::Consumer(job.consumer));
            self.wake(Role::Loader);
            state.sleep = None;
            return;
        }
        if self.still_asleep(&mut state.sleep) || state.jobs.len() > JOBS_MAX {
            return;
        }
        let ticket = self.words[self.wake_word(Role::Loader)].get();
        match producer.next_action().unwrap() {
            Action::Wait => state.sleep = self.sleep(Role::Loader, ticket),
            Action::Republished(job) => self.wake(Role::Consumer(job.consumer)),
            Action::Fill(job) => {
                // The first byte of a fill: whoever still reads the slot notices.
                self.bytes[job.slot].set(None);
                state.jobs.push_back(job);
            }
            Action::Verify(job, checksum) => {
                if self.bytes[job.slot].get() == Some(checksum) || self.bug == Bug::ChecksumNotCompared {
                    producer.publish(job, 8, checksum).unwrap();
                    self.wake(Role::Consumer(job.consumer));
                } else {
                    self.rotten_noticed.set(self.rotten_noticed.get() + 1);
                    producer.abandon(job).unwrap();
                }
            }
        }
    }

    /// What the loader's driver does now and then: epoch first, then the lock.
    fn bury_the_dead(self: &Rc<Self>, producer: &mut Producer<Memory>) {
        for index in 0..self.shape.consumers {
            let epoch = producer.consumer_epoch(index);
            if epoch != 0 && !self.living[index + 1].get() && (!self.chances.get().random || self.dice.roll(3) == 0) {
                producer.bury(index, epoch).unwrap();
            }
        }
    }

    fn trainer_step(self: &Rc<Self>, index: usize, state: &mut Trainer) {
        let Some(ring) = &mut state.ring else {
            let ring = Consumer::attach_as(self.memory(Role::Consumer(index)), self.shape, self.catalogue.clone(), index).unwrap();
            self.epochs[index].set(ring.epoch());
            state.ring = Some(ring);
            state.backlog.extend(&self.script);
            self.wake(Role::Loader);
            return;
        };
        let random = self.chances.get().random;
        if random && self.posting.get() && state.backlog.len() + state.wanted.len() < 60 && self.dice.roll(4) == 0 {
            for _ in 0..1 + self.dice.roll(6) {
                state.backlog.push_back(self.dice.roll(self.catalogue.chunks.len() as u64) as u16);
            }
        }
        if !state.backlog.is_empty() && (!random || self.dice.roll(3) == 0) {
            let posted = ring.post(state.backlog.make_contiguous()).unwrap();
            for block in state.backlog.drain(..posted) {
                state.wanted.extend((0..self.catalogue.chunks[usize::from(block)]).map(|chunk| ChunkId { block, chunk }));
            }
            if posted > 0 {
                self.wake(Role::Loader);
                return;
            }
        }
        if !state.leases.is_empty() && (!random || self.dice.roll(3) == 0) {
            self.give_back(ring, &mut state.leases);
            return;
        }
        if state.wanted.is_empty() || state.leases.len() + 1 >= self.shape.quota().max(2) || self.still_asleep(&mut state.sleep) {
            return;
        }
        let role = Role::Consumer(index);
        let ticket = self.words[self.wake_word(role)].get();
        match ring.try_lease().unwrap() {
            None => state.sleep = self.sleep(role, ticket),
            Some(lease) => {
                assert_eq!(Some(lease.content), state.wanted.pop_front(), "a chunk out of order");
                let seen = self.bytes[lease.slot].get();
                if seen != Some(lease.checksum) && self.bug != Bug::ChecksumNotCompared {
                    assert!(self.rotten.get() > 0, "leased bytes that are not what was published");
                    ring.release_corrupt(&lease).unwrap();
                    self.rotten_noticed.set(self.rotten_noticed.get() + 1);
                    // Exit 70: the next one starts from its checkpoint.
                    resume_unwind(Box::new(Crash));
                }
                assert_eq!(seen, Some(payload_of(lease.content)), "bytes were used that are not the chunk's");
                self.delivered.set(self.delivered.get() + 1);
                state.leases.push_back((lease, payload_of(lease.content)));
            }
        }
    }

    fn give_back(self: &Rc<Self>, ring: &mut Consumer<Memory>, leases: &mut VecDeque<(Leased, u64)>) {
        // In any order: a device's copies may end out of turn.
        let pick = if self.chances.get().random { self.dice.roll(leases.len() as u64) as usize } else { 0 };
        let Some((lease, used)) = leases.remove(pick) else { return };
        assert_eq!(self.bytes[lease.slot].get(), Some(used), "bytes changed while they were leased");
        ring.release(&lease).unwrap();
        self.wake(Role::Loader);
    }

    fn wake_word(&self, whom: Role) -> usize {
        match whom {
            Role::Consumer(index) => self.shape.at(index, consumer::WAKE),
            _ => loader::WAKE,
        }
    }

    /// What `Segment::wake` does: counts, then wakes. The kernel may be late, and here it may forget.
    fn wake(self: &Rc<Self>, whom: Role) {
        let word = &self.words[self.wake_word(whom)];
        word.set(word.get() + 1);
        let chance = self.chances.get().wake;
        let (lost, late) = (self.one_in(chance), self.one_in(chance));
        let rouse = |sleep: &mut Option<Sleep>| {
            if lost {
            } else if let (true, Some(sleep)) = (late, sleep.as_mut()) {
                sleep.until = sleep.until.min(self.clock.get() + 5);
            } else {
                *sleep = None;
            }
        };
        match whom {
            Role::Consumer(index) => self.trainers[index].borrow_mut().as_mut().map(|t| rouse(&mut t.sleep)),
            _ => self.loader.borrow_mut().as_mut().map(|l| rouse(&mut l.sleep)),
        };
    }

    /// What `Segment::wait` does: sleeps unless the count has moved since the ticket was taken.
    fn sleep(&self, who: Role, ticket: u64) -> Option<Sleep> {
        let now = self.words[self.wake_word(who)].get();
        if self.bug == Bug::LostWake {
            return Some(Sleep { until: u64::MAX });
        }
        (now == ticket).then(|| Sleep { until: self.clock.get() + SLEEP_MAX })
    }

    /// A sleeper goes on when its time is over; a wake-up takes its `Sleep` away.
    fn still_asleep(&self, sleep: &mut Option<Sleep>) -> bool {
        match sleep {
            Some(s) if self.clock.get() < s.until => true,
            _ => {
                *sleep = None;
                false
            }
        }
    }

    /// Flips a bit of one slot's payload that nobody holds.
    pub fn rot(&self) {
        let index = self.dice.roll(self.shape.slots as u64) as usize;
        let leased = (0..self.shape.consumers).any(|c| self.share(c, index).state == State::Leased);
        if !leased && self.slot_word(index).state == State::Free && self.bytes[index].get().is_some() {
            self.rotten.set(self.rotten.get() + 1);
            self.bytes[index].set(self.bytes[index].get().map(|b| b ^ 2));
        }
    }

    /// A replaced process acts once more: it must find out and change nothing.
    pub fn zombies_act(self: &Rc<Self>) {
        let replaced = |taken: bool| taken && self.depth.get() == 0;
        if replaced(self.loader.borrow().as_ref().is_some_and(|l| l.producer.is_some()))
            && let Some(mut zombie) = self.zombie_loader.take()
            && let Some(producer) = &mut zombie.producer
        {
            self.frozen.set(true);
            let outcome = match zombie.jobs.pop_front() {
                Some(job) => producer.publish(job, 8, payload_of(job.content)).err(),
                None => producer.next_action().err(),
            };
            self.frozen.set(false);
            assert_eq!(outcome.map(|e| e.exit_code()), Some(69), "a replaced loader went on");
        }
        for (trainer, zombie) in self.trainers.iter().zip(&self.zombie_trainers) {
            if replaced(trainer.borrow().as_ref().is_some_and(|t| t.ring.is_some()))
                && let Some(mut zombie) = zombie.take()
                && let Some(ring) = &mut zombie.ring
            {
                self.frozen.set(true);
                let outcome = match (zombie.leases.pop_front(), self.dice.roll(2)) {
                    (Some((lease, _)), 0) => ring.release(&lease).err(),
                    (Some((lease, _)), _) => ring.release_corrupt(&lease).err(),
                    (None, 0) if !zombie.wanted.is_empty() => ring.try_lease().err(),
                    _ => ring.post(&[0]).err(),
                };
                self.frozen.set(false);
                assert_eq!(outcome.map(|e| e.exit_code()), Some(69), "a replaced consumer went on");
            }
        }
    }

    fn slot_word(&self, index: usize) -> SlotWord {
        SlotWord::unpack(self.words[self.shape.slot(index) + slot::STATE].get()).expect("a known state")
    }

    fn share(&self, consumer: usize, index: usize) -> ShareWord {
        ShareWord::unpack(self.words[self.shape.share(consumer, index)].get()).expect("a known state")
    }

    /// The invariants that can be seen from outside at any time.
    pub fn check(&self) {
        for i in 0..self.shape.slots {
            let word = self.slot_word(i);
            if (0..self.shape.consumers).any(|c| self.share(c, i).state != State::Free) {
                self.check_published(i, word);
            }
        }
        for consumer in 0..self.shape.consumers {
            let out = (0..self.shape.slots).filter(|i| self.share(consumer, *i).state != State::Free).count();
            assert!(out <= self.shape.quota(), "consumer {consumer} has {out} slots, {} are its part", self.shape.quota());
        }
    }

    /// A slot that some consumer has been offered.
    fn check_published(&self, index: usize, word: SlotWord) {
        assert_eq!(word.state, State::Free, "slot {index} is being filled while a consumer has it");
        let descriptor = Descriptor::read(&RawWords(&self.words), self.shape.slot(index)).expect("READY with a valid descriptor");
        assert_eq!(descriptor.generation, word.generation, "slot {index}: READY descriptor of another generation");
        assert_eq!(descriptor.payload, payload_of(descriptor.content));
        if self.rotten.get() == 0 {
            assert_eq!(self.bytes[index].get(), Some(descriptor.payload), "slot {index}: READY bytes are not what the descriptor says");
        }
    }

    /// Every change of a slot's or a share's state, at the operation that makes it.
    fn check_transition(&self, role: Role, at: usize, old: u64, new: u64) {
        if let Some(index) = (0..self.shape.slots).find(|i| self.shape.slot(*i) + slot::STATE == at) {
            let (old, new) = (SlotWord::unpack(old).expect("known"), SlotWord::unpack(new).expect("known"));
            let claim = (old.state, new.state) == (State::Free, State::Filling);
            let back = (old.state, new.state) == (State::Filling, State::Free);
            let grown = if claim { new.generation > old.generation } else { new.generation == old.generation };
            assert!(role == Role::Loader && (claim || back) && grown, "slot {index}: {role:?} went from {old:?} to {new:?}");
            let out = (0..self.shape.consumers).find(|c| self.share(*c, index).state != State::Free);
            assert_eq!(out, None, "slot {index} was claimed while a consumer has it");
        }
        let Some((consumer, index)) = self.whose_share(at) else { return };
        let (old, new) = (ShareWord::unpack(old).expect("known"), ShareWord::unpack(new).expect("known"));
        let legal = match (role, old.state, new.state) {
            (Role::Loader, State::Free, State::Ready) => {
                self.check_published(index, self.slot_word(index));
                true
            }
            (Role::Loader, State::Ready, State::Free) => true,
            // Only from the dead.
            (Role::Loader, State::Leased, State::Free) => self.epochs[consumer].get() != old.epoch,
            (Role::Consumer(own), State::Ready, State::Leased) | (Role::Consumer(own), State::Leased, State::Free) => own == consumer,
            _ => false,
        };
        assert!(legal, "share of {consumer} in slot {index}: {role:?} went from {old:?} to {new:?}");
    }

    fn whose_share(&self, at: usize) -> Option<(usize, usize)> {
        let first = |consumer| self.shape.share(consumer, 0);
        let consumer = (0..self.shape.consumers).find(|c| (first(*c)..first(*c) + self.shape.slots).contains(&at))?;
        Some((consumer, at - first(consumer)))
    }

    /// What a reader of a failure needs: each consumer's place and next chunks, each slot's content and who has it.
    fn picture(&self) -> String {
        let mut lines = vec![format!("{:?}, chunks {:?}", self.shape, self.catalogue.chunks)];
        for (index, trainer) in self.trainers.iter().enumerate() {
            let at = |word| unpack_epoch(self.words[self.shape.at(index, word)].get());
            let (posted, position) = (at(consumer::POSTED), at(consumer::POSITION));
            let wanted = trainer.borrow().as_ref().map(|t| t.wanted.iter().take(8).map(|c| (c.block, c.chunk)).collect::<Vec<_>>());
            lines.push(format!("consumer {index}: posted {posted:?}, position {position:?}, waits for {wanted:?}"));
        }
        for index in 0..self.shape.slots {
            let descriptor = Descriptor::read(&RawWords(&self.words), self.shape.slot(index)).map(|d| (d.content, d.generation));
            let shares: Vec<_> = (0..self.shape.consumers).map(|c| self.share(c, index)).collect();
            lines.push(format!("slot {index}: {:?}, {descriptor:?}, shares {shares:?}", self.slot_word(index)));
        }
        if let Some(loader) = self.loader.borrow().as_ref() {
            lines.push(format!("loader: jobs {:?}, {:?}", loader.jobs, loader.producer));
        }
        lines.join("\n")
    }

    fn has_all(&self, index: usize) -> bool {
        let done = |t: &Trainer| t.ring.is_some() && t.backlog.is_empty() && t.wanted.is_empty() && t.leases.is_empty();
        self.trainers[index].borrow().as_ref().is_some_and(done)
    }

    /// Lets everybody run until all but `except` have what they asked for.
    fn satisfy(self: &Rc<Self>, rounds_max: u64, except: Option<usize>) {
        let others = || (0..self.shape.consumers).filter(|c| Some(*c) != except);
        let mut round = 0;
        while !others().all(|c| self.has_all(c)) {
            let wanted = |c: usize| self.trainers[c].borrow().as_ref().map_or(0, |t| t.wanted.len());
            assert!(
                round < rounds_max,
                "stuck: {:?} chunks wanted, not counting {except:?}\n{}",
                others().map(wanted).collect::<Vec<_>>(),
                self.picture()
            );
            round += 1;
            self.step(Role::Launcher);
            self.step(Role::Loader);
            (0..self.shape.consumers).filter(|c| Some(*c) != except).for_each(|c| self.step(Role::Consumer(c)));
            self.check();
        }
    }

    /// Ends all crashes and lets everybody run until everything asked for has arrived, then looks for slots that are stuck. First
    /// without one consumer that is stopped or dead, if `without` says so: the others get everything nevertheless.
    pub fn come_to_rest(self: &Rc<Self>, rounds_max: u64, without: Option<(usize, bool)>) {
        let before = self.chances.get();
        self.chances.set(Chances { crash: 0, rot: 0, orphan: 0, ..before });
        self.launcher_lives.set(true);
        self.posting.set(false);
        self.stopped.set(None);
        if let Some((index, dies)) = without {
            if dies && let Some(state) = self.trainers[index].take() {
                *self.trainers[index].borrow_mut() = Some(self.bury_trainer(index, state, false));
            }
            self.stopped.set(Some(index));
            self.satisfy(rounds_max, Some(index));
            self.stopped.set(None);
        }
        self.satisfy(rounds_max, None);
        for _ in 0..SLEEP_MAX * 4 {
            self.step(Role::Launcher);
            self.step(Role::Loader);
        }
        self.check();
        for i in 0..self.shape.slots {
            let out: Vec<_> = (0..self.shape.consumers).map(|c| self.share(c, i)).filter(|s| s.state != State::Free).collect();
            let word = self.slot_word(i);
            assert!(word.state == State::Free && out.is_empty(), "slot {i} is stuck though nothing is asked for: {word:?} {out:?}");
        }
    }

    /// Breaks the circle of references.
    pub fn end(&self) {
        self.loader.take();
        self.zombie_loader.take();
        self.trainers.iter().chain(&self.zombie_trainers).for_each(|t| drop(t.take()));
    }

    /// What may happen before an operation of `role`; returns the operation's number.
    fn before(self: &Rc<Self>, role: Role) -> u64 {
        let op = self.ops.get() + 1;
        self.ops.set(op);
        if self.frozen.get() {
            return op;
        }
        if self.depth.get() == 0 && (self.one_in(self.chances.get().preempt) || self.events.contains(&Event::Preempt(op))) {
            self.depth.set(1);
            self.step(self.another(role, op));
            self.depth.set(0);
        }
        self.strike(role, op, Event::CrashBefore(op));
        op
    }

    /// Who cuts in on `role` at operation `op`.
    fn another(&self, role: Role, op: u64) -> Role {
        let draw = if self.chances.get().random { self.dice.roll(1 << 20) } else { op } as usize;
        let consumers = self.shape.consumers;
        match role {
            Role::Loader if self.chances.get().random && draw.is_multiple_of(16) => Role::Launcher,
            Role::Consumer(index) if consumers > 1 && draw.is_multiple_of(3) => Role::Consumer((index + 1) % consumers),
            Role::Consumer(_) => Role::Loader,
            _ => Role::Consumer(draw % consumers),
        }
    }

    fn strike(&self, role: Role, op: u64, planned: Event) {
        let even = matches!(planned, Event::CrashAfter(_));
        let drawn = self.crash_at[role.number()].get().is_some_and(|at| op >= at && even == (at % 2 == 0));
        if !self.frozen.get() && (drawn || self.events.contains(&planned)) {
            self.crash_at[role.number()].set(None);
            resume_unwind(Box::new(Crash));
        }
    }
}

/// Runs `step`; false if the role crashed in it. Failed assertions pass through.
fn survives(step: impl FnOnce()) -> bool {
    match catch_unwind(AssertUnwindSafe(step)) {
        Ok(()) => true,
        Err(reason) if reason.is::<Crash>() => false,
        Err(reason) => resume_unwind(reason),
    }
}

struct RawWords<'a>(&'a [Cell<u64>]);

impl Words for RawWords<'_> {
    fn load(&self, index: usize) -> u64 {
        self.0[index].get()
    }
    fn store(&self, index: usize, value: u64) {
        self.0[index].set(value);
    }
    fn swap(&self, _: usize, _: u64, _: u64) -> Result<(), u64> {
        unreachable!("only looked at")
    }
}

impl Memory {
    fn operate<T>(&self, act: impl FnOnce(&Rc<World>) -> T) -> T {
        let world = self.world.upgrade().expect("the world outlives its memory");
        let op = world.before(self.role);
        let result = act(&world);
        world.strike(self.role, op, Event::CrashAfter(op));
        result
    }

    /// The word as this role sees it: itself, unless a seeded bug looks away.
    fn seen(&self, world: &World, index: usize) -> u64 {
        let value = world.words[index].get();
        if self.role != Role::Loader {
            return value;
        }
        let Some((_, slot)) = world.whose_share(index) else {
            return if self.bug == Bug::MissingEpochCheck && index == loader::EPOCH { self.epoch.get() } else { value };
        };
        let share = ShareWord::unpack(value).expect("known");
        let overlooked = match self.bug {
            Bug::WrongVictim => share.state == State::Ready,
            Bug::FreedByTheFirst => world.released[slot].get(),
            _ => false,
        };
        if overlooked { ShareWord { state: State::Free, ..share }.pack() } else { value }
    }
}

impl Words for Memory {
    fn load(&self, index: usize) -> u64 {
        self.operate(|world| self.seen(world, index))
    }

    fn store(&self, index: usize, value: u64) {
        self.operate(|world| {
            assert!(!world.frozen.get(), "a replaced {:?} wrote word {index}", self.role);
            let first = world.shape.slot(0);
            let state = index >= first && (index - first) % (world.shape.slot(1) - first) == slot::STATE;
            assert!(!state && world.whose_share(index).is_none(), "states change by swaps alone");
            if index == loader::EPOCH {
                self.epoch.set(value);
            }
            world.words[index].set(value);
        });
    }

    fn swap(&self, index: usize, old: u64, new: u64) -> Result<(), u64> {
        self.operate(|world| {
            let share = world.whose_share(index).map(|(_, slot)| (slot, ShareWord::unpack(new).expect("known")));
            let early = self.bug == Bug::EarlyFree && self.role != Role::Loader;
            if early && ShareWord::unpack(old).is_some_and(|w| w.state == State::Leased) {
                return Ok(());
            }
            let found = self.seen(world, index);
            if found != old {
                return Err(found);
            }
            assert!(!world.frozen.get(), "a replaced {:?} swapped word {index}", self.role);
            if !matches!(self.bug, Bug::WrongVictim | Bug::EarlyFree | Bug::FreedByTheFirst) {
                world.check_transition(self.role, index, old, new);
            }
            match share {
                Some((slot, share)) if share.state == State::Free && self.role != Role::Loader => world.released[slot].set(true),
                Some((slot, share)) if share.state == State::Ready => world.released[slot].set(false),
                _ => {}
            }
            let leased = share.filter(|(_, share)| early && share.state == State::Leased);
            world.words[index].set(leased.map_or(new, |(_, share)| ShareWord { state: State::Free, ..share }.pack()));
            Ok(())
        })
    }
}
