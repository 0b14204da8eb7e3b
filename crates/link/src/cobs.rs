//! Consistent Overhead Byte Stuffing (Cheshire and Baker): bytes without a zero among them, so
//! that a zero can end a frame. One byte more for each 254. It must never fail on any bytes.

/// The longest run of bytes without a zero that one group has.
const RUN: usize = 254;

/// Appends `data`, stuffed.
pub(crate) fn stuff(mut data: &[u8], out: &mut Vec<u8>) {
    loop {
        let (window, _) = data.split_at(data.len().min(RUN));
        let zero = memchr::memchr(0, window);
        let run = zero.unwrap_or(window.len());
        // Not more than 255.
        out.push(u8::try_from(run + 1).unwrap_or(u8::MAX));
        let (copied, rest) = data.split_at(run);
        out.extend_from_slice(copied);
        match zero {
            // The zero is the group's end; something follows, though it may be empty.
            Some(_) => data = rest.get(1..).unwrap_or_default(),
            None if rest.is_empty() => return,
            None => data = rest,
        }
    }
}

/// Puts what was stuffed into `out`, which is cleared before; false if nothing can have been
/// stuffed in that way.
pub(crate) fn unstuff(mut stuffed: &[u8], out: &mut Vec<u8>) -> bool {
    out.clear();
    while let Some((&code, rest)) = stuffed.split_first() {
        let Some((run, rest)) =
            usize::from(code).checked_sub(1).and_then(|run| rest.split_at_checked(run))
        else {
            return false;
        };
        out.extend_from_slice(run);
        if code < u8::MAX && !rest.is_empty() {
            out.push(0);
        }
        stuffed = rest;
    }
    true
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stuffed_comes_out_again() {
        let mut cases: Vec<Vec<u8>> = vec![vec![], vec![0], vec![0, 0], vec![1], vec![1, 0]];
        for length in [253, 254, 255, 256, 507, 508, 509, 1000] {
            cases.push(vec![7; length]);
            cases.push(vec![0; length]);
            let mut ends_in_zero = vec![7; length];
            ends_in_zero.push(0);
            cases.push(ends_in_zero);
            cases.push((0..length).map(|at| u8::try_from(at % 256).unwrap()).collect());
        }
        for case in cases {
            let (mut stuffed, mut out) = (Vec::new(), Vec::new());
            stuff(&case, &mut stuffed);
            assert!(!stuffed.contains(&0), "{case:?}");
            assert!(stuffed.len() <= case.len() + case.len() / RUN + 1, "{case:?}");
            assert!(unstuff(&stuffed, &mut out));
            assert_eq!(out, case);
        }
        let mut out = Vec::new();
        assert!(!unstuff(&[5, 1, 2], &mut out), "cut off");
        assert!(!unstuff(&[0, 1], &mut out));
    }
}
