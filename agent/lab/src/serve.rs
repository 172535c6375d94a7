//! What listens in a pod: a small HTTP/1.1 server and a UDP echo, both families on one socket.
//!
//! Answers name the pod, so that a test knows which backend it met. Nothing is read from a
//! request but its path, and nothing is trusted: a request head is at most 8 KiB.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// The line that a server prints once all its sockets listen.
pub const READY: &str = "ready";

const MAX_HEAD_BYTES: usize = 8192;

/// Who serves, and where.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// Name of the pod, put into every answer.
    #[arg(long)]
    pub pod: String,
    /// Name of its node, put into every answer.
    #[arg(long)]
    pub node: String,
    /// TCP port of an HTTP server; may be repeated.
    #[arg(long = "tcp", value_name = "PORT")]
    pub tcp_ports: Vec<u16>,
    /// UDP port of an echo; may be repeated.
    #[arg(long = "udp", value_name = "PORT")]
    pub udp_ports: Vec<u16>,
}

/// The answer to an HTTP request, one JSON line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The pod that answers.
    pub pod: String,
    /// Its node.
    pub node: String,
    /// The client's address as the pod sees it.
    pub client: IpAddr,
    /// The client's port as the pod sees it.
    pub client_port: u16,
    /// The address that the connection arrived at.
    pub local: IpAddr,
    /// The port that the connection arrived at.
    pub local_port: u16,
    /// The path of the request.
    pub path: String,
}

/// Serves until the process is ended.
///
/// # Errors
/// A port cannot be listened on.
pub fn run(args: &ServeArgs) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // An IPv6 wildcard socket takes IPv4 as well (net.ipv6.bindv6only is 0 in a new namespace).
        let any = IpAddr::from(Ipv6Addr::UNSPECIFIED);
        for port in &args.tcp_ports {
            let listener = TcpListener::bind((any, *port)).await?;
            let args = args.clone();
            tokio::spawn(async move {
                loop {
                    // An aborted connection or a full table of files is no reason to end.
                    let Ok((stream, peer)) = listener.accept().await else {
                        continue;
                    };
                    let args = args.clone();
                    tokio::spawn(async move {
                        // The client is gone; there is nobody to tell.
                        let _ = converse(stream, peer, &args).await;
                    });
                }
            });
        }
        for port in &args.udp_ports {
            let socket = UdpSocket::bind((any, *port)).await?;
            let prefix = format!("{} ", args.pod).into_bytes();
            tokio::spawn(async move {
                let mut buffer = vec![0; 65536];
                loop {
                    let Ok((len, peer)) = socket.recv_from(&mut buffer).await else {
                        continue;
                    };
                    let payload = buffer.get(..len).unwrap_or_default();
                    // A datagram may be lost anywhere; the sender counts.
                    let _ = socket.send_to(&[&prefix, payload].concat(), peer).await;
                }
            });
        }
        println!("{READY}");
        std::future::pending::<()>().await;
        Ok(())
    })
}

/// Requests of one connection, one after the other, until the client closes it.
async fn converse(mut stream: TcpStream, peer: SocketAddr, args: &ServeArgs) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let local = stream.local_addr()?;
    let mut pending = Vec::new();
    while let Some(head) = read_head(&mut stream, &mut pending).await? {
        let Some(request) = Request::parse(&head) else {
            return stream
                .write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                .await;
        };
        if let Some(len) = request.path.strip_prefix("/bytes/").and_then(|n| n.parse().ok()) {
            send_bytes(&mut stream, len).await?;
        } else {
            let answer = Answer {
                pod: args.pod.clone(),
                node: args.node.clone(),
                client: peer.ip().to_canonical(),
                client_port: peer.port(),
                local: local.ip().to_canonical(),
                local_port: local.port(),
                path: request.path,
            };
            let mut body = serde_json::to_string(&answer)?;
            body.push('\n');
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all(&[head.as_bytes(), body.as_bytes()].concat()).await?;
        }
        if request.close {
            return Ok(());
        }
    }
    Ok(())
}

/// The next request's head without its empty line; nothing at the end of the connection.
async fn read_head(stream: &mut TcpStream, pending: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    loop {
        if let Some(end) = pending.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = pending.split_off(end + 4);
            let mut head = std::mem::replace(pending, rest);
            head.truncate(end);
            return Ok(Some(head));
        }
        if pending.len() > MAX_HEAD_BYTES || stream.read_buf(pending).await? == 0 {
            return Ok(None);
        }
    }
}

/// A body of `len` bytes, a repeating pattern that shows lost or doubled parts.
async fn send_bytes(stream: &mut TcpStream, len: u64) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: {len}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    let block: Vec<u8> = (0..=255u8).cycle().take(65536).collect();
    let mut left = len;
    while left > 0 {
        let part = left.min(block.len() as u64) as usize;
        stream.write_all(block.get(..part).unwrap_or(&block)).await?;
        left -= part as u64;
    }
    Ok(())
}

/// What is read of a request (RFC 9112).
struct Request {
    path: String,
    /// The client wants the connection closed behind the answer.
    close: bool,
}

impl Request {
    fn parse(head: &[u8]) -> Option<Self> {
        let head = std::str::from_utf8(head).ok()?;
        let mut lines = head.split("\r\n");
        let mut words = lines.next()?.split(' ');
        let (method, path, version) = (words.next()?, words.next()?, words.next()?);
        if method != "GET" || !version.starts_with("HTTP/1.") {
            return None;
        }
        let close = lines.filter_map(|line| line.split_once(':')).any(|(name, value)| {
            name.eq_ignore_ascii_case("connection") && value.trim().eq_ignore_ascii_case("close")
        });
        Some(Self { path: path.to_owned(), close: close || version == "HTTP/1.0" })
    }
}
