"""What a server listens on, its address and its TLS files, so that it can be looked at before anything is loaded."""

from __future__ import annotations

import errno
import socket
import ssl
from pathlib import Path

from core.messages import ConfigError
from core.openai.settings import HttpSettings


def check(settings: HttpSettings) -> None:
    """Raises `ConfigError` for what would keep a server with these settings from starting now."""
    check_tls(settings)
    listen(settings).close()


def listen(settings: HttpSettings) -> socket.socket:
    """A bound socket. Raises `ConfigError` when the address cannot be had."""
    host, port = settings.host, settings.port
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"The host '{host}' is not known ({error.strerror}); use an address of this machine."
        ) from error
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"Port {port} on {host} is taken by another program; stop that, or choose another with "
                "--Frontend.port=N (0 takes a free one)."
            ) from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"Port {port} needs rights that this user lacks; choose one above 1023.") from error
        raise ConfigError(
            f"{host}:{port} cannot be listened on: {error.strerror}; use an address of this machine."
        ) from error
    listener.setblocking(False)
    return listener


def check_tls(settings: HttpSettings) -> None:
    """Raises `ConfigError` when TLS is asked for and its files cannot be used."""
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    if certificate is None:
        if key is not None:
            raise ConfigError("ssl-keyfile is set without ssl-certfile; TLS needs both.")
        return
    for file in (certificate, key):
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"The TLS file '{file}' does not exist; name a PEM file.")
    try:
        # With a password at hand, OpenSSL does not stop to ask the terminal for that of an encrypted key.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except OSError as error:
        why = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigError(
            f"'{certificate}' and its key cannot be used for TLS ({why}); name the PEM files of a certificate and of "
            "its private key, unencrypted."
        ) from error
