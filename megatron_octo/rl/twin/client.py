"""What Ray starts as a worker: asks the nursery for one and leaves. Needs the standard library only.

Usage: python -S -E client.py SOCKET WORKER_SCRIPT [ARGUMENT ...]
"""

import array
import json
import os
import socket
import sys

if __name__ == "__main__":
    request = {"arguments": sys.argv[2:], "environment": dict(os.environ), "directory": os.getcwd()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as nursery:
        nursery.connect(sys.argv[1])
        data = json.dumps(request).encode()
        sent = nursery.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
        nursery.sendall(data[sent:])
        nursery.shutdown(socket.SHUT_WR)
        nursery.recv(1)
