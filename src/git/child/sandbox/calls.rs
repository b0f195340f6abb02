//! seccomp: the system calls that a child has no use for.
//!
//! What is named is refused with "not permitted"; what is newer than this list is answered as an older kernel would, so
//! that the C library does without it.

use std::collections::BTreeMap;

use libc::{c_int, c_long};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter, sock_filter,
};

use super::Access;

/// Calls for which nothing here has a use in any role: other processes, mounts, the kernel itself, its rarely trodden parts.
const NEVER: &[c_long] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_vhangup,
    libc::SYS_personality,
    libc::SYS_mknodat,
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_msgget,
    libc::SYS_semget,
    libc::SYS_mq_open,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
];

/// The same on the one architecture that has them.
#[cfg(target_arch = "x86_64")]
const NEVER_HERE: &[c_long] = &[
    libc::SYS_kexec_file_load,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_uselib,
    libc::SYS_ustat,
    libc::SYS_sysfs,
    libc::SYS__sysctl,
    libc::SYS_mknod,
];
#[cfg(not(target_arch = "x86_64"))]
const NEVER_HERE: &[c_long] = &[];

/// Everything of sockets.
const SOCKETS: &[c_long] = &[
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
];
/// A client waits for nobody, and talks to itself through pipes.
const SERVING: &[c_long] = &[libc::SYS_listen, libc::SYS_accept, libc::SYS_accept4, libc::SYS_socketpair];
/// The kinds of socket that names are looked up and upstreams talked to with; no local ones, behind which services sit.
const FAMILIES: [c_int; 3] = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Starting another program.
const PROGRAMS: &[c_long] = &[libc::SYS_execve, libc::SYS_execveat];
#[cfg(target_arch = "x86_64")]
const FORKS: &[c_long] = &[libc::SYS_fork, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const FORKS: &[c_long] = &[];
/// Signals to others, among them every process of the same user.
const SIGNALS: &[c_long] = &[
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_send_signal,
];

/// Name spaces of its own, in which a process has powers.
const NAME_SPACES: [c_int; 7] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];
/// Putting words into a terminal's mouth.
const TERMINAL: [u64; 2] = [0x5412, 0x541c];

/// The first call that this list does not know; the numbers are those of all architectures from 424 on. A call of the
/// x32 kind has a higher number still.
const UNKNOWN: u32 = 463;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Refuses from now on what `access` has no use for.
pub(super) fn filter(access: &Access) -> Result<(), seccompiler::Error> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(seccompiler::Error::Backend)?;
    let rules = rules(access).map_err(seccompiler::Error::Backend)?;
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, architecture);
    let program: BpfProgram = filter.and_then(BpfProgram::try_from).map_err(seccompiler::Error::Backend)?;
    apply_filter(&unknown())?;
    apply_filter(&program)
}

fn rules(access: &Access) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    let mut always = |calls: &[c_long]| rules.extend(calls.iter().map(|&call| (call, Vec::new())));
    always(NEVER);
    always(NEVER_HERE);
    always(if access.network { SERVING } else { SOCKETS });
    if !access.programs {
        always(PROGRAMS);
        always(FORKS);
        always(SIGNALS);
    }
    let argument = |index, operator, value: u64| SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value);
    let when = |conditions: Vec<Result<SeccompCondition, BackendError>>| {
        SeccompRule::new(conditions.into_iter().collect::<Result<_, _>>()?)
    };
    let number = |value: c_int| u64::from(value.unsigned_abs());
    if access.network {
        let other = FAMILIES.map(|family| argument(0, SeccompCmpOp::Ne, number(family)));
        rules.insert(libc::SYS_socket, vec![when(other.into())?]);
    }
    let mut clones = NAME_SPACES
        .into_iter()
        .map(|space| when(vec![argument(0, SeccompCmpOp::MaskedEq(number(space)), number(space))]))
        .collect::<Result<Vec<_>, _>>()?;
    if !access.programs {
        // Threads, and no processes.
        clones.push(when(vec![argument(0, SeccompCmpOp::MaskedEq(number(libc::CLONE_THREAD)), 0)])?);
        // Signals to its own threads alone.
        let own = u64::from(std::process::id());
        rules.insert(libc::SYS_tgkill, vec![when(vec![argument(0, SeccompCmpOp::Ne, own)])?]);
    }
    rules.insert(libc::SYS_clone, clones);
    // Limits of its own, not of others.
    rules.insert(libc::SYS_prlimit64, vec![when(vec![argument(0, SeccompCmpOp::Ne, 0)])?]);
    let terminal = TERMINAL.map(|request| when(vec![argument(1, SeccompCmpOp::Eq, request)]));
    rules.insert(libc::SYS_ioctl, terminal.into_iter().collect::<Result<_, _>>()?);
    Ok(rules)
}

/// Answers calls that are not known here, and `clone3`, whose arguments no filter sees, as a kernel that lacks them.
fn unknown() -> BpfProgram {
    const LOAD: u16 = 0x20;
    const JUMP_IF_AT_LEAST: u16 = 0x35;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let clone3 = u32::try_from(libc::SYS_clone3).unwrap_or(u32::MAX);
    let absent = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    vec![
        // The number of the call is the first field of what a filter sees.
        sock_filter { code: LOAD, jt: 0, jf: 0, k: 0 },
        sock_filter { code: JUMP_IF_AT_LEAST, jt: 2, jf: 0, k: UNKNOWN },
        sock_filter { code: JUMP_IF_EQUAL, jt: 1, jf: 0, k: clone3 },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: absent },
    ]
}
