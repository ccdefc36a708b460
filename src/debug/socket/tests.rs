use std::os::unix::net::UnixListener as BlockingListener;

use serde_json::json;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream as BlockingStream;

use super::*;

/// Serves `{"answer": 42}` at `path` while `work` runs beside it.
fn serving<T: Send + 'static>(path: &Path, work: impl FnOnce() -> T + Send + 'static) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (asked, mut requests) = mpsc::channel::<Asked>(1);
        let _server = Server::start(path, asked).unwrap();
        let work = tokio::task::spawn_blocking(work);
        let answering = async {
            while let Some(one) = requests.recv().await {
                drop(one.answer.send(Answer::document(&json!({ "answer": 42 }))));
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            done = work => done.unwrap(),
            () = answering => unreachable!("pending"),
        }
    })
}

/// What the server says to a line that `ask` would never send.
fn converse_with(path: &Path, line: &[u8]) -> String {
    let mut stream = BlockingStream::connect(path).unwrap();
    // The server may have hung up in the middle of an oversized line.
    let _sent = stream.write_all(line);
    let mut answer = String::new();
    let _hung_up = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn question_is_answered_by_whoever_receives_it_and_the_socket_goes_with_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("subnet.sock");
    let client = path.clone();
    let (answer, mode) = serving(&path, move || {
        let mode = fs::metadata(&client).unwrap().permissions().mode() & 0o777;
        (ask(&client, &Request::Status), mode)
    });
    assert_eq!(answer.unwrap(), json!({ "answer": 42 }));
    assert_eq!(mode, 0o600);
    assert!(!path.exists());
}

#[test]
fn nonsense_is_answered_with_what_can_be_asked_and_the_server_lives_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let client = path.clone();
    serving(&path, move || {
        for line in [
            &b"status\n"[..],
            b"{\"query\":\"stop\"}\n",
            b"\n",
            b"{\"query\":",
        ] {
            let mut stream = BlockingStream::connect(&client).unwrap();
            stream.write_all(line).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert!(
                answer.contains("error") && answer.contains("status"),
                "{answer}"
            );
        }
        let endless = vec![b'x'; 100_000];
        assert!(!converse_with(&client, &endless).contains("42"));
        assert_eq!(converse_with(&client, b"\xff\xfe\n"), "");
        ask(&client, &Request::Status).unwrap();
    });
}

#[test]
fn hundred_silent_clients_make_room_for_one_that_asks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let client = path.clone();
    serving(&path, move || {
        let mut silent: Vec<BlockingStream> = (0..100)
            .map(|_| BlockingStream::connect(&client).unwrap())
            .collect();
        // Some have begun a sentence, some have said that they will not.
        for stream in silent.iter_mut().step_by(3) {
            let _sent_away = stream.write_all(b"{\"query\":");
        }
        for stream in silent.iter().step_by(5) {
            let _sent_away = stream.shutdown(std::net::Shutdown::Write);
        }
        for _ in 0..20 {
            assert_eq!(
                ask(&client, &Request::Status).unwrap(),
                json!({ "answer": 42 })
            );
        }
        let stays = |stream: &mut BlockingStream| {
            stream.set_nonblocking(true).unwrap();
            let read = stream.read(&mut [0]);
            read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        };
        let left = silent
            .iter_mut()
            .filter_map(|stream| stays(stream).then_some(()));
        assert!(
            left.count() < MAX_CLIENTS,
            "nobody beyond the limit is kept"
        );
    });
}

#[test]
fn clients_that_all_wait_for_an_answer_are_not_sent_away_for_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (asked, mut requests) = mpsc::channel::<Asked>(MAX_CLIENTS);
        let _server = Server::start(&path, asked).unwrap();
        let client = path.clone();
        let ask_one = move || {
            let client = client.clone();
            tokio::task::spawn_blocking(move || ask(&client, &Request::Status))
        };
        let waiting: Vec<_> = (0..MAX_CLIENTS).map(|_| ask_one()).collect();
        let mut held = Vec::new();
        while held.len() < MAX_CLIENTS {
            held.push(requests.recv().await.unwrap());
        }
        let refused = ask_one().await.unwrap();
        assert!(refused.is_err(), "{refused:?}");
        for one in held {
            one.answer
                .send(Answer::document(&json!({ "answer": 42 })))
                .unwrap();
        }
        for one in waiting {
            assert_eq!(one.await.unwrap().unwrap(), json!({ "answer": 42 }));
        }
    });
}

#[test]
fn stale_socket_is_replaced_and_anything_else_is_refused_and_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(BlockingListener::bind(&path).unwrap());
    assert!(path.exists());
    let client = path.clone();
    serving(&path, move || ask(&client, &Request::Status).unwrap());

    let start = |path: &Path| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async { Server::start(path, mpsc::channel(1).0).map(drop) })
    };
    let live = BlockingListener::bind(&path).unwrap();
    assert!(matches!(start(&path), Err(SocketError::InUse(_))));
    assert!(path.exists());
    drop(live);

    let file = dir.path().join("file");
    fs::write(&file, "data").unwrap();
    assert!(matches!(start(&file), Err(SocketError::NotASocket(_))));
    assert_eq!(fs::read_to_string(&file).unwrap(), "data");
    assert!(start(&dir.path().join("none").join("s")).is_err());
}

#[test]
fn path_is_derived_from_the_subnet_file() {
    for (file, socket) in [
        ("/run/flannel/subnet.env", "/run/flannel/subnet.sock"),
        ("/vxlan.env", "/vxlan.sock"),
        ("/run/subnet", "/run/subnet.sock"),
        ("/run/a.b", "/run/a.b.sock"),
    ] {
        assert_eq!(beside(Path::new(file)), Path::new(socket));
    }
}

#[test]
fn absent_daemon_is_named_by_its_socket() {
    let error = ask(Path::new("/nonexistent/subnet.sock"), &Request::Status).unwrap_err();
    assert!(
        error.to_string().contains("/nonexistent/subnet.sock"),
        "{error}"
    );
}
