//! The system calls that neither the standard library nor rustix has a safe function for.
//! All of the package's `unsafe` is here, and nothing here decides anything.
//!
//! Most of them go through [`call`]. It is sound for calls that read and write no memory
//! but what their arguments point to and that leave the caller's memory map alone; a caller
//! gives buffers as large as the call may write. Calls that map memory, or that return
//! twice, have functions of their own.

use std::ffi::{CStr, c_int, c_long};
use std::io::Error;
use std::os::fd::{FromRawFd, OwnedFd};

/// How long an attempt may take.
const SECONDS: u32 = 30;

/// An argument of a system call.
pub enum Arg<'a> {
    /// A number; a negative one is passed with its sign.
    Num(i64),
    /// A pointer to memory that the kernel reads.
    In(&'a [u8]),
    /// A pointer to memory that the kernel may read and write.
    Out(&'a mut [u8]),
    /// A pointer to a string.
    Text(&'a CStr),
}

/// Makes a system call with up to six arguments; those left out are 0.
pub fn call(number: c_long, arguments: &mut [Arg<'_>]) -> Result<i64, Error> {
    let mut raw = [0_i64; 6];
    for (to, from) in raw.iter_mut().zip(arguments) {
        *to = match from {
            Arg::Num(value) => *value,
            Arg::In(bytes) => bytes.as_ptr() as i64,
            Arg::Out(bytes) => bytes.as_mut_ptr() as i64,
            Arg::Text(text) => text.as_ptr() as i64,
        };
    }
    // SAFETY: every pointer among the arguments comes from a reference that lives until the
    // call returns, and callers keep to what the head of this module says.
    let result = unsafe { libc::syscall(number, raw[0], raw[1], raw[2], raw[3], raw[4], raw[5]) };
    if result == -1 { Err(Error::last_os_error()) } else { Ok(result) }
}

/// Takes over a descriptor that a call has just made.
pub fn owned(result: Result<i64, Error>) -> Result<OwnedFd, Error> {
    let fd = i32::try_from(result?).map_err(|_| Error::from_raw_os_error(libc::EBADF))?;
    if fd < 0 {
        return Err(Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the caller passes the result of a call that made this descriptor just now.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// 64-bit numbers as the bytes of a structure.
pub fn words(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// 32-bit numbers as the bytes of a structure.
pub fn halves(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// The address of some bytes, for structures that hold pointers.
pub fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr() as u64
}

/// The descriptors above 2 that are open.
pub fn open_descriptors() -> Vec<i32> {
    // Not through /proc, which may be missing, and whose listing opens one more.
    // SAFETY: asking for the flags of a descriptor touches no memory.
    (3..4096).filter(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0).collect()
}

/// How a process ended.
pub enum Ending {
    Exit(u8),
    Signal(c_int),
}

/// Runs something in a child process and waits for it.
pub fn apart(work: impl FnOnce() -> u8) -> Result<Ending, Error> {
    // SAFETY: this process has one thread, so the child may do all that the parent could.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(Error::last_os_error());
    }
    if child == 0 {
        // SAFETY: takes a number; SIGALRM then ends the child, as nobody handles it.
        unsafe { libc::alarm(SECONDS) };
        std::process::exit(i32::from(work()));
    }
    let mut status = 0;
    loop {
        // SAFETY: the status is a live integer of our own.
        if unsafe { libc::waitpid(child, &raw mut status, 0) } == child {
            break;
        }
        let error = Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
    if libc::WIFSIGNALED(status) {
        return Ok(Ending::Signal(libc::WTERMSIG(status)));
    }
    Ok(Ending::Exit(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(2)))
}

/// clone(2) with flags and a child that ends at once. The flags must not share memory.
pub fn clone_child(flags: c_int) -> Result<(), Error> {
    let flags =
        i64::from(flags & !(libc::CLONE_VM | libc::CLONE_THREAD)) | i64::from(libc::SIGCHLD);
    // SAFETY: without a stack and without shared memory the child is a copy, as with fork.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0_i64, 0_i64, 0_i64, 0_i64) };
    after_clone(child)
}

/// The same through clone3(2).
pub fn clone3_child(flags: c_int) -> Result<(), Error> {
    #[allow(clippy::cast_sign_loss, reason = "flags are a set of bits")]
    let flags = (flags & !(libc::CLONE_VM | libc::CLONE_THREAD)) as u32;
    let arguments = words(&[u64::from(flags), 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0]);
    // SAFETY: as in `clone_child`; the structure is read while the call lasts.
    let child = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), arguments.len()) };
    after_clone(child)
}

fn after_clone(child: c_long) -> Result<(), Error> {
    match child {
        0 => {
            // SAFETY: ends the child, which has done nothing, without any clean-up.
            unsafe { libc::_exit(0) }
        }
        -1 => Err(Error::last_os_error()),
        _ => {
            // SAFETY: no status is asked for.
            unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::__WALL) };
            Ok(())
        }
    }
}

/// Makes a segment of SysV shared memory with these bytes; gives its number.
pub fn make_shared(key: i32, bytes: &[u8]) -> Result<c_int, Error> {
    // SAFETY: takes numbers.
    let id = unsafe { libc::shmget(key, 4096, libc::IPC_CREAT | libc::IPC_EXCL | 0o666) };
    if id < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: lets the kernel choose the place, so no memory of ours is covered.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    if at as isize == -1 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the segment has 4096 bytes, and no more than those are written; the
    // attachment ends after the last use.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.cast(), bytes.len().min(4096));
        libc::shmdt(at);
    }
    Ok(id)
}

/// The bytes of somebody's segment of SysV shared memory.
pub fn read_shared(key: i32) -> Result<Vec<u8>, Error> {
    // SAFETY: takes numbers.
    let id = unsafe { libc::shmget(key, 0, 0) };
    if id < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: as above.
    let at = unsafe { libc::shmat(id, std::ptr::null(), libc::SHM_RDONLY) };
    if at as isize == -1 {
        return Err(Error::last_os_error());
    }
    let mut bytes = vec![0; 64];
    // SAFETY: a segment has at least a page, of which the beginning is copied.
    unsafe {
        std::ptr::copy_nonoverlapping(at.cast::<u8>(), bytes.as_mut_ptr(), bytes.len());
        libc::shmdt(at);
    }
    Ok(bytes)
}

/// Maps one huge page and lets go of it again.
pub fn map_huge_page() -> Result<(), Error> {
    const SIZE: usize = 2 << 20;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
    // SAFETY: the kernel chooses the place; nothing refers to the memory when it goes.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), SIZE, libc::PROT_READ, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        libc::munmap(at, SIZE);
    }
    Ok(())
}

/// A system call through the gate for 32-bit programs, with numbers as arguments.
#[cfg(target_arch = "x86_64")]
pub fn call32(number: u32, arguments: [u32; 4]) -> Result<i64, Error> {
    let [first, second, third, fourth] = arguments;
    let result: i32;
    // SAFETY: the kernel keeps every register but the one for the result; the compiler
    // keeps rbx for itself, so it is put back. Callers pass no pointer but null or an
    // address that is none of ours, so no memory is written. Where the gate is closed,
    // this ends the process by a signal.
    unsafe {
        std::arch::asm!(
            "xchg {first:r}, rbx",
            "int 0x80",
            "xchg {first:r}, rbx",
            first = inout(reg) u64::from(first) => _,
            inlateout("eax") number.cast_signed() => result,
            in("ecx") second,
            in("edx") third,
            in("esi") fourth,
            in("edi") 0_u32,
            // The 32-bit gate clears these on some kernels.
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    if result < 0 && result > -4096 {
        return Err(Error::from_raw_os_error(-result));
    }
    Ok(i64::from(result))
}
