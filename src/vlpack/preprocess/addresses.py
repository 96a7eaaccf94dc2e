"""Decides which IP addresses belong to the public internet, from a list of address blocks kept in this module.

``ipaddress.is_global`` is not used: its answers depend on the Python version, and it calls some addresses public that
lead to the machine itself or to its cloud provider. Sources: IANA's special-purpose address registries for IPv4 and
IPv6, and IANA's registry of the IPv6 address space, as of 2025.
"""

from __future__ import annotations

import ipaddress

_NOT_PUBLIC_4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # shared by a provider's customers
            "127.0.0.0/8",  # this machine
            "168.63.129.16/32",  # the Azure host, as its virtual machines see it; in no registry
            "169.254.0.0/16",  # link-local; cloud providers' metadata
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments; Oracle's metadata is at 192.0.0.192
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # 6to4 relays, deprecated
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/3",  # multicast, reserved, broadcast
        ),
    )
)
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
"""Global unicast addresses. All others are refused: loopback, link-local, site-local (fec0::/10), unique local,
multicast, and the translation prefixes such as 64:ff9b:1::/48 and ::ffff:0:0:0/96."""
_NOT_PUBLIC_6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, whose addresses lead to any IPv4 address
            "3fff::/20",  # documentation
        ),
    )
)
_WITH_IPV4 = (ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96"))
"""IPv6 forms of an IPv4 address, which is the last 32 bits: IPv4-mapped addresses, and NAT64 addresses, by which a
network without IPv4 reaches the IPv4 internet."""


def is_public_address(address: str) -> bool:
    """Whether an IP address belongs to the public internet; an IPv4 address embedded in an IPv6 one is checked too."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if not any(ip in network for network in _WITH_IPV4):
            return ip in _PUBLIC_6 and not any(ip in network for network in _NOT_PUBLIC_6)
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return not any(ip in network for network in _NOT_PUBLIC_4)
