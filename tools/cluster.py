"""Help torchrun on a cluster: find the host of the store, and the network interface of gloo."""
import ipaddress
import os
import socket
import struct

# This address belongs to nobody (RFC 5737). The interface that leads there is that of the default route. Nothing is
# sent.
_ANYWHERE = '192.0.2.1'
_SIOCGIFADDR = 0x8915


def hosts_store(endpoint):
    """Return True if this pod of a Kubernetes Indexed Job is the first one and the endpoint names the first pod.

    Return False in the other pods, and None outside of such a job. torchrun compares the endpoint with the machine's
    names. A pod that starts before the DNS knows its name does not recognise itself, and then no pod hosts the store.
    """
    index, pod = os.environ.get('JOB_COMPLETION_INDEX'), endpoint.partition(':')[0].partition('.')[0]
    return index == '0' if index is not None and pod.endswith('-0') else None


def _address_of(interface):
    import fcntl
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        found = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack('256s', interface.encode()[:15]))
    return socket.inet_ntoa(found[20:24])


def _interface_to(host):
    """Return the interface that leads to a host, or None if it is the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((host, 9))
        own = sock.getsockname()[0]
    if ipaddress.ip_address(own).is_loopback:
        return None
    for _, name in socket.if_nameindex():
        try:
            if _address_of(name) == own:
                return name
        except OSError:  # the interface has no address
            continue
    return None


def gloo_interface(endpoint):
    """Return the interface that leads to the other nodes, or None if gloo finds it or if there is none.

    gloo listens on the address of the host's own name. On Debian that is 127.0.1.1, which other nodes cannot reach.
    """
    try:
        if not ipaddress.ip_address(socket.gethostbyname(socket.gethostname())).is_loopback:
            return None
    except OSError:  # the name does not resolve, and gloo takes the loopback
        pass
    for host in filter(None, (endpoint.rpartition(':')[0] or endpoint, _ANYWHERE)):
        try:
            if (name := _interface_to(host)) is not None:
                return name
        except (OSError, ImportError):  # no address or no route; this system is not Unix
            continue
    return None


def prepare(args):
    """Set torchrun's arguments for a training on several nodes, and the environment of its processes."""
    if args.standalone or args.nnodes.split(':')[-1] == '1':
        return
    endpoint = args.rdzv_endpoint or args.master_addr
    host = hosts_store(endpoint)
    if host is not None and args.rdzv_backend == 'c10d' and 'is_host' not in args.rdzv_conf:
        args.rdzv_conf = ','.join(filter(None, (args.rdzv_conf, f'is_host={str(host).lower()}')))
    if 'GLOO_SOCKET_IFNAME' not in os.environ and (name := gloo_interface(endpoint)) is not None:
        os.environ['GLOO_SOCKET_IFNAME'] = name
