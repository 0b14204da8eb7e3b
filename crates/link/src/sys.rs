//! Ioctls that rustix does not wrap. Nothing else may be here.

use std::os::fd::AsFd;

use rustix::io::Result;
use rustix::ioctl::{IntegerSetter, NoArg, Setter, ioctl, opcode};

/// What the entropy pool is credited with (random(4), `struct rand_pool_info`).
#[repr(C)]
struct Entropy {
    bits: i32,
    size: i32,
    bytes: [u8; 64],
}

/// Lets nobody write to the file system of an open directory (`FIFREEZE`).
pub(crate) fn freeze(directory: impl AsFd) -> Result<()> {
    const FIFREEZE: rustix::ioctl::Opcode = opcode::read_write::<i32>(b'X', 119);
    // SAFETY: it ignores its argument.
    unsafe { ioctl(directory, IntegerSetter::<FIFREEZE>::new_usize(0)) }
}

/// Ends that (`FITHAW`).
pub(crate) fn thaw(directory: impl AsFd) -> Result<()> {
    const FITHAW: rustix::ioctl::Opcode = opcode::read_write::<i32>(b'X', 120);
    // SAFETY: it ignores its argument.
    unsafe { ioctl(directory, IntegerSetter::<FITHAW>::new_usize(0)) }
}

/// Adds to the kernel's entropy, counts all of it as such, and has it used at once.
pub(crate) fn add_entropy(random: impl AsFd, bytes: [u8; 64]) -> Result<()> {
    const RNDADDENTROPY: rustix::ioctl::Opcode = opcode::write::<[i32; 2]>(b'R', 3);
    const RNDRESEEDCRNG: rustix::ioctl::Opcode = opcode::none(b'R', 7);
    let entropy = Entropy { bits: 512, size: 64, bytes };
    // SAFETY: the kernel reads two numbers and as many bytes as the second says, which follow.
    unsafe { ioctl(random.as_fd(), Setter::<RNDADDENTROPY, Entropy>::new(entropy)) }?;
    // SAFETY: it has no argument.
    unsafe { ioctl(random, NoArg::<RNDRESEEDCRNG>::new()) }
}
