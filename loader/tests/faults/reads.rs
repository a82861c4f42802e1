//! F13 to F15: what the kernel may refuse, and what reads may bring.

use std::os::unix::process::CommandExt;

use nix::libc;
use nix::sys::resource::{Resource, setrlimit};
use serenity_protocol::ring::words::State;

use crate::lab::{Lab, Reader, Running};

/// Two passes over everything, each byte compared; the loader's log.
fn serves(lab: &Lab, loader: Running) -> String {
    let mut reader = Reader::open(lab);
    reader.pass();
    assert_eq!(lab.count(State::Leased), 0);
    reader.finish();
    loader.expect(0)
}

#[test]
fn f13_serves_with_a_memory_lock_of_64_kib_and_without_root() {
    let lab = Lab::open_to_all(6);
    let (mut command, log) = lab.command();
    // SAFETY: between fork and exec only one system call is made, on values that were there before.
    unsafe { command.pre_exec(|| setrlimit(Resource::RLIMIT_MEMLOCK, 65536, 65536).map_err(std::io::Error::from)) };
    if rustix::process::geteuid().is_root() {
        // Root does not feel the limit.
        if every_folder_is_open(command.get_program().as_ref()) && every_folder_is_open(&lab.config) {
            command.uid(65534).gid(65534);
        } else {
            eprintln!("SKIPPED the change of user of F13: the build folder is not readable for others");
        }
    }
    serves(&lab, Running::of(command, log));
}

fn every_folder_is_open(path: &std::path::Path) -> bool {
    let open =
        |p: &std::path::Path| std::fs::metadata(p).is_ok_and(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()) & 0o5 == 0o5);
    path.ancestors().skip(1).filter(|p| !p.as_os_str().is_empty()).all(open)
}

/// A filter that refuses `io_uring_setup` as a container's does, and allows everything else.
fn refuse_io_uring() -> std::io::Result<()> {
    let step = |code: u32, jump_true: u8, jump_false: u8, k: u32| libc::sock_filter { code: code as u16, jt: jump_true, jf: jump_false, k };
    let mut filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: two system calls on this process; the program outlives the second, which copies it.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
    };
    if refused { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[test]
fn f14_serves_where_io_uring_is_refused() {
    const SAID: &str = "io_uring is not available";
    let lab = Lab::new(6);
    let (mut command, log) = lab.command();
    // SAFETY: between fork and exec only system calls are made, nothing is allocated.
    unsafe { command.pre_exec(refuse_io_uring) };
    let said = serves(&lab, Running::of(command, log));
    assert_eq!(said.matches(SAID).count(), 1, "said once:\n{said}");
    // The same by the switch, which the other tests use; and with nothing refused, nothing is said.
    assert_eq!(serves(&lab, lab.loader("refuse=io_uring")).matches(SAID).count(), 1);
    serves(&lab, lab.loader("refuse=registered_buffers"));
}

#[test]
fn f15_short_and_interrupted_reads_are_taken_up_where_they_stopped() {
    let lab = Lab::new(6);
    for engine in ["", ",refuse=io_uring"] {
        for faults in ["read=short:*2", "read=eintr:*2", "read=eagain:*3", "read=short:*3,read=eintr:*5,read=eagain:*7"] {
            let said = serves(&lab, lab.loader(&format!("{faults}{engine}")));
            assert!(said.contains("FAULT SWITCHES ARE ON"), "{said}");
        }
    }
}

#[test]
fn f15_an_io_error_ends_the_loader_with_path_and_offset() {
    let lab = Lab::new(6);
    for engine in ["", ",refuse=io_uring"] {
        for read in [1, 40] {
            let loader = lab.loader(&format!("read=eio:{read}{engine}"));
            // Asks for everything, so that there is a fortieth read.
            let reader = (read > 1).then(|| Reader::open(&lab));
            if let Some(mut reader) = reader {
                while let Some(leased) = reader.lease_while(|segment| segment.is_held(serenity_protocol::ring::segment::RingRole::Loader)) {
                    reader.check_and_release(&leased);
                }
            }
            let said = loader.expect(65);
            assert!(said.contains("flux2tiny_int8.safetensors") && said.contains("offset") && said.contains("os error 5"), "{said}");
        }
    }
}
