//! As much of a packet as the gateway has to know. The bytes are the sandbox's.

use std::net::{IpAddr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    Icmpv4Message, Icmpv4Packet, Icmpv6Message, Icmpv6Packet, IpProtocol, IpRepr, Ipv4Packet,
    Ipv6Packet, TcpPacket, UdpPacket, UdpRepr,
};

/// A packet that the gateway may do something with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) transport: Transport<'a>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Transport<'a> {
    /// `opens` is whether it is the first packet of a connection.
    Tcp {
        opens: bool,
    },
    Udp(&'a [u8]),
    /// A question whether someone is there; its ports are 0.
    Echo,
}

impl<'a> Packet<'a> {
    /// Nothing for what is cut off, in fragments, or of another kind.
    pub(super) fn read(bytes: &'a [u8]) -> Option<Self> {
        let (from, to, protocol, payload): (IpAddr, IpAddr, _, _) = match bytes.first()? >> 4 {
            4 => {
                let packet = Ipv4Packet::new_checked(bytes).ok()?;
                if packet.more_frags() || packet.frag_offset() != 0 || !packet.verify_checksum() {
                    return None;
                }
                let (from, to) = (packet.src_addr(), packet.dst_addr());
                (from.into(), to.into(), packet.next_header(), packet.payload())
            }
            6 => {
                let packet = Ipv6Packet::new_checked(bytes).ok()?;
                let (from, to) = (packet.src_addr(), packet.dst_addr());
                (from.into(), to.into(), packet.next_header(), packet.payload())
            }
            _ => return None,
        };
        let (ports, transport) = match protocol {
            IpProtocol::Tcp => {
                let packet = TcpPacket::new_checked(payload).ok()?;
                let opens = packet.syn() && !packet.ack() && !packet.rst() && !packet.fin();
                ((packet.src_port(), packet.dst_port()), Transport::Tcp { opens })
            }
            IpProtocol::Udp => {
                let packet = UdpPacket::new_checked(payload).ok()?;
                if !packet.verify_checksum(&from.into(), &to.into()) {
                    return None;
                }
                ((packet.src_port(), packet.dst_port()), Transport::Udp(packet.payload()))
            }
            IpProtocol::Icmp if from.is_ipv4() => {
                let packet = Icmpv4Packet::new_checked(payload).ok()?;
                (packet.msg_type() == Icmpv4Message::EchoRequest).then_some(())?;
                ((0, 0), Transport::Echo)
            }
            IpProtocol::Icmpv6 if from.is_ipv6() => {
                let packet = Icmpv6Packet::new_checked(payload).ok()?;
                (packet.msg_type() == Icmpv6Message::EchoRequest).then_some(())?;
                ((0, 0), Transport::Echo)
            }
            _ => return None,
        };
        if transport != Transport::Echo && (ports.0 == 0 || ports.1 == 0) {
            return None;
        }
        let (from, to) = (SocketAddr::new(from, ports.0), SocketAddr::new(to, ports.1));
        Some(Self { from, to, transport })
    }
}

/// A packet with a datagram; nothing if there can be none.
pub(super) fn datagram(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Option<Vec<u8>> {
    if from.is_ipv4() != to.is_ipv4() || data.len() > super::MTU - 48 {
        return None;
    }
    let udp = UdpRepr { src_port: from.port(), dst_port: to.port() };
    let (source, target) = (from.ip().into(), to.ip().into());
    let length = udp.header_len() + data.len();
    let ip = IpRepr::new(source, target, IpProtocol::Udp, length, 64);
    let checksums = ChecksumCapabilities::default();
    let mut packet = vec![0; ip.buffer_len()];
    ip.emit(&mut packet, &checksums);
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut packet[ip.header_len()..]),
        &source,
        &target,
        data.len(),
        |payload| payload.copy_from_slice(data),
        &checksums,
    );
    Some(packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chance::Chance;

    #[test]
    fn a_datagram_is_read_as_it_was_written() {
        for (from, to) in
            [("10.0.2.15:1000", "1.1.1.1:53"), ("[fd00::15]:1000", "[2001:4860:4860::8888]:53")]
        {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            let bytes = datagram(from, to, b"hello").unwrap();
            let expected = Packet { from, to, transport: Transport::Udp(b"hello") };
            assert_eq!(Packet::read(&bytes), Some(expected));
            for end in 0..bytes.len() {
                assert_eq!(Packet::read(&bytes[..end]), None);
            }
        }
        assert_eq!(datagram("10.0.2.15:1".parse().unwrap(), "[::1]:1".parse().unwrap(), b""), None);
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let mut chance = Chance::new(0xbac);
        for (from, to) in [("10.0.2.15:9", "1.1.1.1:53"), ("[fd00::15]:9", "[fd00::2]:53")] {
            let whole = datagram(from.parse().unwrap(), to.parse().unwrap(), &[0; 40]).unwrap();
            for _ in 0..50_000 {
                let mut bytes = whole.clone();
                for _ in 0..=chance.below(4) {
                    let at = chance.below(bytes.len().min(50));
                    bytes[at] = chance.byte();
                }
                // All kinds of transport.
                bytes[if from.starts_with('[') { 6 } else { 9 }] = [6, 17, 1, 58][chance.below(4)];
                bytes.truncate(chance.below(bytes.len() + 1));
                let _ = Packet::read(&bytes);
            }
        }
    }
}
