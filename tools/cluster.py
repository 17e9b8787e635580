"""What torchrun does not find out by itself on a cluster: who hosts the store, and the network interface for gloo."""
import ipaddress
import os
import socket
import struct

# Nobody's (RFC 5737). Which interface would lead there is that of the default route; nothing is sent.
_SOMEWHERE = '192.0.2.1'
_SIOCGIFADDR = 0x8915


def hosts_store(endpoint):
    """Whether this pod of a Kubernetes Indexed Job is the first one, if that is where all meet; None elsewhere.

    torchrun compares the endpoint with the machine's names. A pod that starts before its own name is known to the DNS
    takes itself for another, and then nobody hosts the store.
    """
    index, pod = os.environ.get('JOB_COMPLETION_INDEX'), endpoint.partition(':')[0].partition('.')[0]
    return index == '0' if index is not None and pod.endswith('-0') else None


def _address_of(interface):
    import fcntl
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        found = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack('256s', interface.encode()[:15]))
    return socket.inet_ntoa(found[20:24])


def _interface_to(host):
    """The interface that leads to a host, unless it is the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, 9))
        own = sock.getsockname()[0]
    if ipaddress.ip_address(own).is_loopback:
        return None
    for _, name in socket.if_nameindex():
        try:
            if _address_of(name) == own:
                return name
        except OSError:  # it has no address
            continue
    return None


def gloo_interface(endpoint):
    """The interface that leads to the other nodes, if gloo would not take it; None if it would, or if there is none.

    gloo listens where the host's own name leads. On Debian that is 127.0.1.1, which other nodes do not reach.
    """
    try:
        if not ipaddress.ip_address(socket.gethostbyname(socket.gethostname())).is_loopback:
            return None
    except OSError:  # a name that does not resolve: gloo takes the loopback
        pass
    for host in filter(None, (endpoint.rpartition(':')[0] or endpoint, _SOMEWHERE)):
        try:
            if (name := _interface_to(host)) is not None:
                return name
        except (OSError, ImportError):  # it does not resolve or there is no way; no Unix
            continue
    return None


def prepare(args):
    """torchrun's arguments of a training on several nodes, and the environment of its processes."""
    if args.standalone or args.nnodes.split(':')[-1] == '1':
        return
    endpoint = args.rdzv_endpoint or args.master_addr
    host = hosts_store(endpoint)
    if host is not None and args.rdzv_backend == 'c10d' and 'is_host' not in args.rdzv_conf:
        args.rdzv_conf = ','.join(filter(None, (args.rdzv_conf, f'is_host={str(host).lower()}')))
    if 'GLOO_SOCKET_IFNAME' not in os.environ and (name := gloo_interface(endpoint)) is not None:
        os.environ['GLOO_SOCKET_IFNAME'] = name
