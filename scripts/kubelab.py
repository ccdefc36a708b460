#!/usr/bin/env python3
"""kubelab: a real Kubernetes cluster on one machine, every node a set of namespaces, for any flannel-compatible daemon.

  kubelab up [--nodes 2] [--version 1.34.3]       build what is missing (cached), start control plane and nodes
  kubelab image NAME BINARY[:DST] [SRC[:DST]...]  from-scratch image with these files and their shared libraries, on every node
  kubelab load ARCHIVE                            an OCI archive, on every node
  kubelab apply FILE [--sub OLD=NEW]              kubectl apply -f FILE, after replacing text
  kubelab daemon PATH [--cni PATH] [...]          run a flannel-compatible daemon as a DaemonSet (or --plain), with a CNI conf
  kubelab pods [--keep]                           one HTTP pod per node; every pod must reach every pod, the service and the API
  kubelab kubectl ARGS...                         kubectl as cluster admin
  kubelab node N CMD...                           run a command inside node N (all its namespaces)
  kubelab restart NODE PROC                       restart kubelet | containerd | kube-proxy of a node, or a ctl process
  kubelab reboot NODE [--off SECONDS]             power cycle of a node
  kubelab status                                  nodes, processes, memory
  kubelab down                                    remove every process, namespace, mount, cgroup and file it made

Nodes kl-n0.. have ul0 = 192.0.2.(i+1) (a veth, a bridge in kl-ctl for more than two) with the default route, ct0 = 203.0.113.(i+1)
to the control namespace kl-ctl at 203.0.113.254 (etcd, apiserver, controller-manager, scheduler). Pods 198.18.0.0/16, services
198.19.0.0/16 through kube-proxy. Every node has its own net, mount, pid, uts, ipc and cgroup namespace and its own root
directory (only /usr and /dev are the machine's), so a manifest's hostPath mounts land in /tmp/kubelab/nI/root. Images have no registry:
NAME must carry a host part of its own (localhost/x:1), imagePullPolicy must not be Always.
"""
import argparse, base64, contextlib, hashlib, json, os, re, shlex, shutil, signal, subprocess, sys, time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import oci_image

LAB = "/tmp/kubelab"
# What is built once; scripts/setup --kube keeps its programs in the same place.
BIN = os.environ.get("LODEN_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "loden")
BUILD = f"{BIN}/build"
STATE = f"{LAB}/state.json"
API = "https://203.0.113.254:6443"
POD_CIDR, SVC_CIDR, SVC_API = "198.18.0.0/16", "198.19.0.0/16", "198.19.0.1"
TOOL_IMAGE, PAUSE_IMAGE = "localhost/kubelab-tool:1", "localhost/kubelab-pause:1"
CNI_DIR, CNI_PLUGINS = "/usr/lib/cni", ["bridge", "host-local", "loopback", "portmap", "bandwidth", "firewall", "tuning", "ptp"]
KCONF = f"{LAB}/pki/admin.kubeconfig"
PATH = f"/lab/bin:/lab/bin/deb/usr/bin:/lab/bin/deb/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin"


def sh(cmd, check=True, **kw):
    r = subprocess.run(cmd, shell=isinstance(cmd, str), text=True, capture_output=True, **kw)
    if check and r.returncode:
        raise SystemExit(f"kubelab: {cmd if isinstance(cmd, str) else shlex.join(map(str, cmd))}: exit {r.returncode}\n{r.stdout}{r.stderr}")
    return r.stdout


def say(*a):
    print(f"[{time.time() - T0:6.1f}s]", *a, flush=True)


T0 = time.time()


def put(path, text, mode=0o644):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.write(text)
    os.chmod(path, mode)


def load():
    try:
        return json.load(open(STATE))
    except FileNotFoundError:
        raise SystemExit("kubelab: not up (run: kubelab up)")


def save(st):
    put(STATE, json.dumps(st, indent=1))


def starttime(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def until(what, fn, secs, step=0.2):
    end = time.time() + secs
    while True:
        r = fn()
        if r:
            return r
        if time.time() > end:
            raise SystemExit(f"kubelab: gave up after {secs} s waiting for {what}")
        time.sleep(step)


# --------------------------------------------------------------------------------------------------------------------- build

MAINS = {
    "kube-apiserver": "app.NewAPIServerCommand()", "kube-controller-manager": "app.NewControllerManagerCommand()",
    "kube-scheduler": "app.NewSchedulerCommand()", "kube-proxy": "app.NewProxyCommand()",
    "kubelet": "app.NewKubeletCommand(context.Background())",
}
KUBECTL = """package main

import (
	"k8s.io/component-base/cli"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
)

func main() {
	if err := cli.RunNoErrOutput(cmd.NewDefaultKubectlCommand()); err != nil {
		util.CheckErr(err)
	}
}
"""
TOOL = r"""package main

// pause, an HTTP server which is also a client, and cp (also by the names cp and install-conf), for images made from nothing.

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func get(url string) (int, string, error) {
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	r, err := c.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), err
}

func main() {
	cmd := "pause"
	switch n := filepath.Base(os.Args[0]); {
	case n == "cp" || n == "install-conf":
		os.Args = append([]string{n, "cp"}, os.Args[1:]...)
	}
	if len(os.Args) > 1 {
		cmd = os.Args[1]
	}
	switch cmd {
	case "pause":
		go func() {
			for {
				var st syscall.WaitStatus
				if _, err := syscall.Wait4(-1, &st, 0, nil); err != nil {
					time.Sleep(time.Second)
				}
			}
		}()
		s := make(chan os.Signal, 1)
		signal.Notify(s, syscall.SIGTERM, syscall.SIGINT)
		<-s
	case "serve":
		h, _ := os.Hostname()
		body := make([]byte, 1<<20)
		http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
			a, _, _ := net.SplitHostPort(r.RemoteAddr)
			fmt.Fprintf(w, "%s saw %s\n", h, a)
		})
		http.HandleFunc("/big", func(w http.ResponseWriter, r *http.Request) { w.Write(body) })
		http.HandleFunc("/get", func(w http.ResponseWriter, r *http.Request) {
			code, b, err := get(r.URL.Query().Get("url"))
			fmt.Fprintln(w, code, b, err)
		})
		fmt.Println(http.ListenAndServe(os.Args[2], nil))
		os.Exit(1)
	case "get": // get URL...: print status, size, beginning; fails on any error
		for _, u := range os.Args[2:] {
			code, b, err := get(u)
			if err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			n := len(b)
			if len(b) > 200 {
				b = b[:200]
			}
			fmt.Println(code, n, b)
		}
	case "cp": // cp [-f] SRC DST: atomic
		a := os.Args[len(os.Args)-2:]
		b, err := os.ReadFile(a[0])
		if err == nil {
			err = os.WriteFile(a[1]+".tmp", b, 0755)
		}
		if err == nil {
			err = os.Rename(a[1]+".tmp", a[1])
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
}
"""


def build(version):
    """Binaries of Kubernetes from the Go module proxy, containerd and runc from Debian (unpacked, not installed)."""
    out = f"{BIN}/kubernetes-v{version}"
    os.makedirs(out, exist_ok=True)
    env = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"}
    want = [c for c in [*MAINS, "kubectl"] if not os.access(f"{out}/{c}", os.X_OK)]
    if want:
        d = f"{BUILD}/{version}"
        os.makedirs(d, exist_ok=True)
        v, staging = f"v{version}", "v0." + version.split(".", 1)[1]
        put(f"{d}/go.mod", "module kubelab\n\ngo 1.21\n")
        info = json.loads(sh(["go", "mod", "download", "-json", f"k8s.io/kubernetes@{v}"], cwd=d, env=env))
        up = open(info["GoMod"]).read()
        mods = sorted(set(re.findall(r"(k8s\.io/[a-z-]+) => \./staging", up)))
        put(f"{d}/go.mod", f"module kubelab\n\ngo {re.search(r'^go (.*)$', up, re.M)[1]}\n\nrequire k8s.io/kubernetes {v}\n" +
            "".join(f"require {m} {staging}\nreplace {m} => {m} {staging}\n" for m in mods))
        for c, ctor in MAINS.items():
            ctx = '\t"context"\n' if "context." in ctor else ""
            put(f"{d}/{c}/main.go", f'package main\n\nimport (\n{ctx}\t"os"\n\n\t"k8s.io/component-base/cli"\n\t"k8s.io/kubernetes/cmd/{c}/app"\n)\n\n'
                f"func main() {{ os.Exit(cli.Run({ctor})) }}\n")
        put(f"{d}/kubectl/main.go", KUBECTL)
        sh(["go", "mod", "tidy"], cwd=d, env=env)
        minor = version.split(".")[1]
        x = " ".join(f"-X {p}.{k}={val}" for p in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
                     for k, val in (("gitVersion", v), ("gitMajor", "1"), ("gitMinor", minor)))
        for c in want:
            say("building", c, v)
            sh(["go", "build", "-trimpath", "-ldflags", f"-s -w {x}", "-o", f"{out}/{c}", f"./{c}"], cwd=d, env=env)
    tool = f"{BIN}/kltool"
    stamp = hashlib.sha256(TOOL.encode()).hexdigest()
    if not os.access(tool, os.X_OK) or open(f"{BUILD}/kltool/stamp").read() != stamp:
        put(f"{BUILD}/kltool/go.mod", "module kltool\n\ngo 1.21\n")
        put(f"{BUILD}/kltool/main.go", TOOL)
        sh(["go", "build", "-trimpath", "-ldflags", "-s -w", "-o", tool, "."], cwd=f"{BUILD}/kltool", env=env)
        put(f"{BUILD}/kltool/stamp", stamp)
    deb = f"{BIN}/deb"
    if not os.access(f"{deb}/usr/bin/containerd", os.X_OK):
        say("unpacking containerd and runc from Debian's packages")
        os.makedirs(f"{deb}/dl", exist_ok=True)
        sh("apt-get download -o APT::Sandbox::User=root containerd runc", cwd=f"{deb}/dl")
        sh(f"for d in dl/*.deb; do dpkg -x $d .; done", cwd=deb)
    for f in ("etcd", "openssl", "nsenter", "unshare", "iptables"):
        if not shutil.which(f):
            raise SystemExit(f"kubelab: {f} is missing (Debian: etcd-server openssl util-linux iptables)")
    if not os.path.exists(f"{CNI_DIR}/bridge"):
        raise SystemExit("kubelab: Debian's containernetworking-plugins is missing")
    return out


# ---------------------------------------------------------------------------------------------------------------- namespaces

def cgroups():
    """(controllers, directory) of this process in every cgroup v1 hierarchy; nodes live below it."""
    res = []
    mounts = [l.split() for l in open("/proc/self/mountinfo")]
    mounts = [(m[4], m[m.index("-") + 3]) for m in mounts if m[m.index("-") + 1] == "cgroup"]
    for l in open("/proc/self/cgroup"):
        _, ctl, path = l.rstrip("\n").split(":", 2)
        if ctl:
            for mp, opts in mounts:
                if set(ctl.split(",")) <= set(opts.split(",")):
                    res.append((ctl, mp + path.rstrip("/")))
    return res


def in_node(st, node, argv, **kw):
    """argv to run inside every namespace of a node (or ctl)."""
    n = st["nodes"][node]
    return ["nsenter", "-t", str(n["init"]), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--", *argv]


def start(st, node, name, argv, env=None):
    """Start a process in a node (or ctl), remembered by name; output to LAB/NODE/log/NAME.log."""
    log = f"{LAB}/{node}/log/{name}.log"
    os.makedirs(os.path.dirname(log), exist_ok=True)
    e = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", **(env or {})}
    n = st["nodes"][node]
    with open(log, "ab") as f:
        cmd = in_node(st, node, ["env", "-i", *[f"{k}={v}" for k, v in e.items()], "/bin/sh", "-c", 'echo $$ > "$0"; exec "$@"', pidfile(node, name), *argv])
        wrap = "".join(f"echo $$ > {shlex.quote(d)}/cgroup.procs; " for d in n["cgroups"]) + 'exec "$@"'
        subprocess.Popen(["/bin/sh", "-c", wrap, "sh", *cmd], stdout=f, stderr=f, stdin=subprocess.DEVNULL, start_new_session=True, cwd="/")
    n["procs"][name] = {"argv": argv, "env": env or {}}
    save(st)


def pidfile(node, name):
    """Where a process's id inside its node lies, as seen from inside."""
    return f"{LAB}/ctl/{name}.pid" if node == "ctl" else f"/lab/run/{name}.pid"


NODE_INIT = r"""set -e
R=@LAB@/@N@/root
mount --make-rprivate /
mount --bind $R $R
hostname kl-@N@
mount --bind /usr $R/usr; mount -o remount,bind,ro $R/usr
mount --rbind /dev $R/dev; mount --make-rslave $R/dev
mount -t proc proc $R/proc
mount -t sysfs sysfs $R/sys
mount -t tmpfs -o mode=755 tmpfs $R/run
mount -t tmpfs -o mode=755 tmpfs $R/sys/fs/cgroup
@CG@
mount --bind @BIN@ $R/lab/bin; mount -o remount,bind,ro $R/lab/bin
mkdir -p $R/run/lock $R/lab/run
# what kubelet would set for the whole machine is shown to it as already set
while read f v; do
  [ -e $R/proc/sys/$f ] || continue
  mkdir -p $R/lab/sys; echo $v > $R/lab/sys/${f##*/}; mount --bind $R/lab/sys/${f##*/} $R/proc/sys/$f
done <<E
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
E
cd $R
mkdir -p lab/old
pivot_root . lab/old
cd /
umount -l /lab/old
mount --make-rshared /
ip link set lo up
touch /lab/run/ready
trap : TERM INT HUP
while :; do sleep 1000000 & wait $!; done
"""

CTL_INIT = r"""set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
ip link set lo up
touch @LAB@/ctl/ready
trap : TERM INT HUP
while :; do sleep 1000000 & wait $!; done
"""


def mkroot(node):
    """A node's root directory: links into /usr, a few files of /etc, everything else its own."""
    r = f"{LAB}/{node}/root"
    if os.path.exists(f"{r}/etc/hostname"):
        return r
    for d in ("usr dev proc sys run tmp root home mnt opt/cni/bin etc/cni/net.d var/lib/kubelet var/lib/containerd var/lib/cni "
              "var/log/pods var/log/containers var/tmp var/cache lab/bin lab/run lab/etc lab/img").split():
        os.makedirs(f"{r}/{d}", exist_ok=True)
    os.chmod(f"{r}/tmp", 0o1777)
    for l in ("bin", "sbin", "lib", "lib64", "lib32"):
        if os.path.islink(f"/{l}"):
            os.symlink(f"usr/{l}", f"{r}/{l}")
    os.symlink("/run", f"{r}/var/run")
    for f in ("alternatives", "passwd", "group", "nsswitch.conf", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "protocols", "services",
              "iproute2", "ethertypes", "os-release", "localtime"):
        if os.path.exists(f"/etc/{f}"):
            sh(["cp", "-a", f"/etc/{f}", f"{r}/etc/{f}"])
    put(f"{r}/etc/hostname", f"kl-{node}\n")
    put(f"{r}/etc/hosts", f"127.0.0.1 localhost\n127.0.0.1 kl-{node}\n")
    put(f"{r}/etc/resolv.conf", "nameserver 203.0.113.254\n")
    put(f"{r}/etc/machine-id", hashlib.md5(f"kubelab {node}".encode()).hexdigest() + "\n")
    for p in CNI_PLUGINS:
        shutil.copy(f"{CNI_DIR}/{p}", f"{r}/opt/cni/bin/{p}")
    return r


def spawn(st, node):
    """The namespaces of a node (or ctl): an init process that keeps them, whose death ends everything in them."""
    ctl = node == "ctl"
    os.makedirs(f"{LAB}/{node}/log", exist_ok=True)
    cg = [(c, f"{d}/kubelab-{node}") for c, d in cgroups()]
    for c, d in cg:
        os.makedirs(d, exist_ok=True)
        if c == "cpuset":
            parent = os.path.dirname(d)
            for k in ("cpuset.cpus", "cpuset.mems"):
                with open(f"{d}/{k}", "w") as f:
                    f.write(open(f"{parent}/{k}").read())
    if ctl:
        script = CTL_INIT
    else:
        mkroot(node)
        lines = []
        for c, _ in cg:
            name = c.removeprefix("name=").replace(",", "_")
            lines.append(f"mkdir $R/sys/fs/cgroup/{name}; mount -t cgroup -o {'none,' if c.startswith('name=') else ''}{c} cgroup $R/sys/fs/cgroup/{name}")
            lines += [f"ln -s {name} $R/sys/fs/cgroup/{x}" for x in c.split(",") if "," in c]
        script = NODE_INIT.replace("@CG@", "\n".join(lines))
    put(f"{LAB}/{node}/init.sh", script.replace("@N@", node).replace("@LAB@", LAB).replace("@BIN@", BIN))
    wrap = "".join(f"echo $$ > {shlex.quote(d)}/cgroup.procs; " for _, d in cg)
    wrap += (f"exec nsenter --net=/run/netns/kl-{node} unshare --mount --uts --ipc --pid --cgroup --propagation private "
             f"--fork --kill-child bash {LAB}/{node}/init.sh")
    with open(f"{LAB}/{node}/log/init.log", "ab") as f:
        p = subprocess.Popen(["/bin/sh", "-c", wrap], stdout=f, stderr=f, stdin=subprocess.DEVNULL, start_new_session=True)
    st["nodes"][node] = {"unshare": p.pid, "unshare_start": starttime(p.pid), "cgroups": [d for _, d in cg], "procs": {}}
    save(st)
    flag = f"{LAB}/ctl/ready" if ctl else f"{LAB}/{node}/root/lab/run/ready"

    def ready():
        if p.poll() is not None:
            raise SystemExit(f"kubelab: {node} did not start:\n" + open(f"{LAB}/{node}/log/init.log").read())
        return os.path.exists(flag)
    until(f"namespaces of {node}", ready, 20, 0.02)
    kids = [int(d) for d in os.listdir("/proc") if d.isdigit() and ppid(d) == p.pid]
    st["nodes"][node]["init"] = kids[0]
    st["nodes"][node]["init_start"] = starttime(kids[0])
    save(st)


def ppid(pid):
    try:
        return int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def addresses(i):
    ns = f"ip netns exec kl-n{i}"
    for dev, ip in (("ul0", f"192.0.2.{i + 1}"), ("ct0", f"203.0.113.{i + 1}")):
        sh(f"{ns} ip addr add {ip}/24 dev {dev} && {ns} ip link set {dev} up")
    sh(f"{ns} ip link set lo up && {ns} ip route add default via 192.0.2.254 dev ul0")


def network(n):
    def ns(name, cmd):
        sh(f"ip netns exec kl-{name} {cmd}")
    for name in ["ctl", *[f"n{i}" for i in range(n)]]:
        sh(f"ip netns add kl-{name}")
        ns(name, "sysctl -qw net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0")
    ns("ctl", "ip link add ctbr type bridge")
    ns("ctl", "ip addr add 203.0.113.254/24 dev ctbr")
    ns("ctl", "ip link set ctbr up")
    if n == 2:
        sh("ip link add ul0 netns kl-n0 type veth peer name ul0 netns kl-n1")
    else:
        ns("ctl", "ip link add ulbr type bridge")
        ns("ctl", "ip link set ulbr up")
        for i in range(n):
            sh(f"ip link add ul0 netns kl-n{i} type veth peer name ul{i} netns kl-ctl")
            ns("ctl", f"ip link set ul{i} master ulbr up")
    for i in range(n):
        sh(f"ip link add ct0 netns kl-n{i} type veth peer name ct{i} netns kl-ctl")
        ns("ctl", f"ip link set ct{i} master ctbr up")
        addresses(i)
        ns(f"n{i}", "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
        ns("ctl", f"ip route add 192.0.2.{i + 1}/32 via 203.0.113.{i + 1}")


# ------------------------------------------------------------------------------------------------------------- control plane

def pki(nodes):
    d = f"{LAB}/pki"
    os.makedirs(d, exist_ok=True)
    q = dict(cwd=d)
    sh("openssl ecparam -name prime256v1 -genkey -noout -out ca.key && "
       "openssl req -x509 -new -key ca.key -subj /CN=kubelab-ca -days 3650 -out ca.crt", **q)
    sh("openssl genrsa -out sa.key 2048 2>/dev/null && openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null", **q)

    def cert(name, subj, san=None):
        put(f"{d}/{name}.ext", f"extendedKeyUsage=serverAuth,clientAuth\n" + (f"subjectAltName={san}\n" if san else ""))
        sh(f"openssl ecparam -name prime256v1 -genkey -noout -out {name}.key && openssl req -new -key {name}.key -subj '{subj}' -out {name}.csr && "
           f"openssl x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -extfile {name}.ext -out {name}.crt 2>/dev/null", **q)
    cert("apiserver", "/CN=kube-apiserver", f"IP:203.0.113.254,IP:127.0.0.1,IP:{SVC_API},DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc")
    cert("kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client")
    ca = base64.b64encode(open(f"{d}/ca.crt", "rb").read()).decode()
    tokens, users = [], {"admin": ("admin", "system:masters"), "kcm": ("system:kube-controller-manager", "system:masters"),
                         "scheduler": ("system:kube-scheduler", ""), "proxy": ("system:kube-proxy", "")}
    users |= {f"kubelet-{n}": (f"system:node:kl-{n}", "system:nodes") for n in nodes}
    for name, (user, group) in users.items():
        tok = os.urandom(16).hex()
        tokens.append(f'{tok},{user},{name},"{group}"')
        put(f"{d}/{name}.kubeconfig", json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "kubelab",
            "clusters": [{"name": "kubelab", "cluster": {"server": API, "certificate-authority-data": ca}}],
            "users": [{"name": name, "user": {"token": tok}}],
            "contexts": [{"name": "kubelab", "context": {"cluster": "kubelab", "user": name}}]}), 0o600)
    put(f"{d}/tokens.csv", "\n".join(tokens) + "\n", 0o600)


def control(st):
    p, k = f"{LAB}/pki", st["k8s"]
    start(st, "ctl", "etcd", ["etcd", "--data-dir", f"{LAB}/ctl/etcd", "--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls",
                              "http://127.0.0.1:2379", "--listen-peer-urls", "http://127.0.0.1:2380", "--log-level", "error"])
    start(st, "ctl", "kube-apiserver", [
        f"{k}/kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--bind-address=203.0.113.254", "--advertise-address=203.0.113.254",
        "--secure-port=6443", f"--tls-cert-file={p}/apiserver.crt", f"--tls-private-key-file={p}/apiserver.key", f"--client-ca-file={p}/ca.crt",
        f"--kubelet-client-certificate={p}/kubelet-client.crt", f"--kubelet-client-key={p}/kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP", f"--service-account-key-file={p}/sa.pub", f"--service-account-signing-key-file={p}/sa.key",
        "--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=Node,RBAC", f"--token-auth-file={p}/tokens.csv",
        f"--service-cluster-ip-range={SVC_CIDR}", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true"])
    until("the API server", lambda: kubectl("get", "--raw", "/readyz", check=False).startswith("ok"), 60)
    start(st, "ctl", "kube-controller-manager", [
        f"{k}/kube-controller-manager", f"--kubeconfig={p}/kcm.kubeconfig", "--allocate-node-cidrs", f"--cluster-cidr={POD_CIDR}",
        f"--service-cluster-ip-range={SVC_CIDR}", f"--root-ca-file={p}/ca.crt", f"--service-account-private-key-file={p}/sa.key",
        "--leader-elect=false", "--bind-address=127.0.0.1"])
    start(st, "ctl", "kube-scheduler", [f"{k}/kube-scheduler", f"--kubeconfig={p}/scheduler.kubeconfig", "--leader-elect=false", "--bind-address=127.0.0.1"])
    kubectl("apply", "-f", "-", input=json.dumps({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "kubelab-proxy"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
        "subjects": [{"kind": "User", "name": "system:kube-proxy"}]}))


CONTAINERD = """version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "@PAUSE@"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "@SNAP@"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"""


def node_up(st, node, snapshotter):
    i, r = int(node[1:]), f"{LAB}/{node}/root"
    kbin = st["k8s"].replace(BIN, "/lab/bin")
    put(f"{r}/lab/etc/containerd.toml", CONTAINERD.replace("@PAUSE@", PAUSE_IMAGE).replace("@SNAP@", snapshotter))
    put(f"{r}/lab/etc/ca.crt", open(f"{LAB}/pki/ca.crt").read())
    put(f"{r}/lab/etc/kubelet.kubeconfig", open(f"{LAB}/pki/kubelet-{node}.kubeconfig").read(), 0o600)
    put(f"{r}/lab/etc/proxy.kubeconfig", open(f"{LAB}/pki/proxy.kubeconfig").read(), 0o600)
    put(f"{r}/lab/etc/kubelet.json", json.dumps({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration", "address": "0.0.0.0", "cgroupDriver": "cgroupfs",
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True}, "x509": {"clientCAFile": "/lab/etc/ca.crt"}},
        "authorization": {"mode": "Webhook"}, "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock", "failSwapOn": False,
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99, "resolvConf": "/etc/resolv.conf", "maxPods": 110,
        "volumePluginDir": "/var/lib/kubelet/volumeplugins", "clusterDomain": "cluster.local"}))
    start(st, node, "containerd", ["/lab/bin/deb/usr/bin/containerd", "-c", "/lab/etc/containerd.toml"])
    until(f"containerd on {node}", lambda: subprocess.run(in_node(st, node, ["/lab/bin/deb/usr/bin/ctr", "version"]), capture_output=True).returncode == 0, 30)
    start(st, node, "kubelet", [f"{kbin}/kubelet", "--config=/lab/etc/kubelet.json", "--kubeconfig=/lab/etc/kubelet.kubeconfig",
                                f"--hostname-override=kl-{node}", f"--node-ip=192.0.2.{i + 1}", "--v=2"])
    put(f"{r}/lab/etc/proxy.json", json.dumps({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": st["proxy"], "hostnameOverride": f"kl-{node}",
        "clientConnection": {"kubeconfig": "/lab/etc/proxy.kubeconfig"}, "clusterCIDR": POD_CIDR, "bindAddress": "0.0.0.0",
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}}))
    start(st, node, "kube-proxy", [f"{kbin}/kube-proxy", "--config=/lab/etc/proxy.json"])


def kubectl(*args, check=True, **kw):
    st = load()
    return sh(["nsenter", "--net=/run/netns/kl-ctl", f"{st['k8s']}/kubectl", f"--kubeconfig={KCONF}", *args], check=check, **kw)


# -------------------------------------------------------------------------------------------------------------------- images

def image(name, files, links=(), entry=None):
    """An image with files [(src, dst)] and links [(path, target)], on every node."""
    if ":" not in name.rsplit("/", 1)[1]:
        name += ":latest"
    data = oci_image.archive(name, files, links, entry)
    load_image(name, data)
    return name, len(data)


def load_image(name, data):
    """Imports an OCI archive on every node."""
    st = load()
    jobs = []
    for node in [n for n in st["nodes"] if n != "ctl"]:
        jobs.append(subprocess.Popen(in_node(st, node, ["env", f"PATH={PATH}", "ctr", "-n", "k8s.io", "images", "import", "--snapshotter", st["snapshotter"], "-"]),
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for j in jobs:
        o, _ = j.communicate(data)
        if j.returncode:
            raise SystemExit(f"kubelab: import of {name}: {o.decode()}")


def net_tools():
    """iptables (nft and legacy) and nft as files and links for an image whose daemon calls them."""
    multi = os.path.realpath(shutil.which("iptables"))
    files = [(multi, "/usr/sbin/xtables-nft-multi"), (shutil.which("nft") or "", "/usr/sbin/nft"), (shutil.which("ip"), "/usr/sbin/ip")]
    xt = [d for d in ("/usr/lib/x86_64-linux-gnu/xtables", "/usr/lib/aarch64-linux-gnu/xtables") if os.path.isdir(d)]
    files += [(d, d) for d in xt]
    links = [(f"/usr/sbin/{p}{s}", "xtables-nft-multi") for p in ("iptables", "ip6tables") for s in ("", "-save", "-restore")]
    return [f for f in files if f[0]], links


def split(spec, where="/"):
    src, _, dst = spec.partition(":")
    if not os.path.exists(src):
        raise SystemExit(f"kubelab: no file {src}")
    return os.path.abspath(src), dst or where + os.path.basename(src.rstrip("/"))


# ------------------------------------------------------------------------------------------------------------------ commands

def cmd_up(a):
    if os.path.exists(STATE):
        raise SystemExit("kubelab: already up (kubelab down first)")
    k8s = build(a.version)
    say("binaries ready")
    st = {"k8s": k8s, "nodes": {}, "snapshotter": a.snapshotter, "proxy": a.proxy_mode}
    names = [f"n{i}" for i in range(a.nodes)]
    save(st)
    try:
        pki(names)
        network(a.nodes)
        for n in ["ctl", *names]:
            spawn(st, n)
        say("namespaces ready")
        control(st)
        say("control plane ready")
        for n in names:
            node_up(st, n, a.snapshotter)
        image(PAUSE_IMAGE, [(f"{BIN}/kltool", "/kltool")])
        image(TOOL_IMAGE, [(f"{BIN}/kltool", "/kltool")])
        until("registered nodes", lambda: len(kubectl("get", "nodes", "-o", "name", check=False).split()) == a.nodes, 60)
        until("pod CIDRs", lambda: len(kubectl("get", "nodes", "-o", "jsonpath={.items[*].spec.podCIDR}").split()) == a.nodes, 60)
        until("the default service account", lambda: kubectl("get", "sa", "default", "-o", "name", check=False), 30)
    except BaseException:
        say("failed; logs are in " + f"{LAB}/*/log, `kubelab down` cleans up")
        raise
    print(kubectl("get", "nodes", "-o", "wide"), end="")
    say(f"up (NotReady until a CNI conf is in /etc/cni/net.d)")


def kill_nodes(st, names):
    """End every process of these nodes, by ending the init process of their process namespace."""
    alive = [(n[k], n[f"{k}_start"]) for n in (st["nodes"][x] for x in names) for k in ("init", "unshare") if n.get(k)]
    for pid, t in alive:
        if starttime(pid) == t:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for pid, t in alive:
        until(f"the end of process {pid}", lambda: starttime(pid) != t or state(pid) == "Z", 30, 0.05)


def rm_cgroups(tops):
    left = []
    for base in [b for t in tops for b, _, _ in os.walk(t, topdown=False)]:
        for _ in range(100):
            try:
                os.rmdir(base)
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.05)
        else:
            left.append(base)
    return left


def cmd_reboot(a):
    """A node's power cycle: every process, /run, all links but its two cards, all routes and rules are gone; disks and API objects stay."""
    st = load()
    node = a.node.removeprefix("kl-")
    n, ns, i = st["nodes"][node], f"ip netns exec kl-{node}", int(node[1:])
    kill_nodes(st, [node])
    rm_cgroups(n["cgroups"])
    for l in json.loads(sh(f"{ns} ip -j link")):
        if l["ifname"] not in ("lo", "ul0", "ct0"):
            sh(f"{ns} ip link del {l['ifname']}", check=False)
    for c in ("ip addr flush dev ul0", "ip addr flush dev ct0", "nft flush ruleset", "conntrack -F", "ip xfrm state flush", "ip xfrm policy flush",
              "ip rule flush", "ip rule add pref 32766 table main", "ip rule add pref 32767 table default", "ip link set ul0 down", "ip link set ct0 down"):
        sh(f"{ns} {c}", check=False)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{LAB}/{node}/root/lab/run/ready")
    time.sleep(a.off)
    addresses(i)
    spawn(st, node)
    node_up(st, node, st["snapshotter"])
    for name, p in n["procs"].items():
        if name not in st["nodes"][node]["procs"]:
            start(st, node, name, p["argv"], p["env"])
    say(f"{node} rebooted")


def cmd_down(a):
    try:
        st = json.load(open(STATE))
    except FileNotFoundError:
        st = {"nodes": {}}
    kill_nodes(st, list(st["nodes"]))
    left = rm_cgroups({d for n in st["nodes"].values() for d in n["cgroups"]} |
                      {f"{d}/{e}" for _, d in cgroups() for e in os.listdir(d) if e.startswith("kubelab-")})
    for n in [l.split()[0] for l in sh("ip netns list").splitlines() if l.startswith("kl-")]:
        sh(f"ip netns del {n}")
    for l in open("/proc/self/mountinfo"):
        if l.split()[4].startswith(LAB + "/"):
            left.append("mount " + l.split()[4])
    if left:
        raise SystemExit("kubelab: left behind: " + " ".join(left))
    shutil.rmtree(LAB, ignore_errors=True)
    if os.path.exists(LAB):
        sh(f"rm -rf {LAB}")
    say("down")


def state(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def cmd_kubectl(a):
    st = load()
    os.execvp("nsenter", ["nsenter", "--net=/run/netns/kl-ctl", f"{st['k8s']}/kubectl", f"--kubeconfig={KCONF}", *a.args])


def cmd_node(a):
    st = load()
    node = a.node.removeprefix("kl-")
    node = node if node in st["nodes"] else f"n{node}"
    argv = in_node(st, node, ["env", f"PATH={PATH}", *(a.args or ["/bin/bash"])])
    os.execvp(argv[0], argv)


def cmd_image(a):
    files, links = [split(a.binary)], []
    files += [split(e) for e in a.extra]
    if a.net_tools:
        f, links = net_tools()
        files += f
    name, size = image(a.name, files, links)
    print(f"{name}: {size >> 10} KiB on every node")


def cmd_load(a):
    with open(a.archive, "rb") as f:
        load_image(a.archive, f.read())


def cmd_apply(a):
    text = open(a.file).read()
    for sub in a.sub:
        old, _, new = sub.partition("=")
        if old not in text:
            raise SystemExit(f"kubelab: {old} is not in {a.file}")
        text = text.replace(old, new)
    print(kubectl("apply", "-f", "-", input=text), end="")


def cmd_daemon(a):
    """The daemon as a hostNetwork DaemonSet shaped like flannel's manifest, or as a plain process in every node; and a CNI conf."""
    st = load()
    nodes = [n for n in st["nodes"] if n != "ctl"]
    conf = {"Network": POD_CIDR, "EnableNFTables": a.nft, "Backend": json.loads(a.backend) if a.backend.startswith("{") else {"Type": a.backend}}
    flags = ["--kube-subnet-mgr", "--ip-masq", *(["--iface=" + a.iface] if a.iface else []), *a.arg]
    chain = {"name": "cbr0", "cniVersion": "0.3.1", "plugins": [
        {"type": "flannel", "delegate": {"hairpinMode": True, "isDefaultGateway": True}}, {"type": "portmap", "capabilities": {"portMappings": True}}]}
    if a.plain:
        for n in nodes:
            r = f"{LAB}/{n}/root"
            put(f"{r}/etc/kube-flannel/net-conf.json", json.dumps(conf))
            shutil.copy(a.path, f"{r}/lab/etc/daemon")
            put(f"{r}/lab/etc/daemon.kubeconfig", open(KCONF).read(), 0o600)
            if a.cni:
                shutil.copy(a.cni, f"{r}/opt/cni/bin/flannel")
                put(f"{r}/etc/cni/net.d/10-flannel.conflist", json.dumps(chain))
            start(st, n, "daemon", ["/lab/etc/daemon", "--kubeconfig-file=/lab/etc/daemon.kubeconfig", *flags], {"NODE_NAME": f"kl-{n}"})
    else:
        files, links = net_tools()
        files = [(os.path.abspath(a.path), "/opt/bin/flanneld"), (f"{BIN}/kltool", "/kltool"), *files]
        if a.cni:
            files.append((os.path.abspath(a.cni), "/flannel"))
        img, size = image(f"localhost/kubelab-daemon:{time.time_ns()}", files, links)
        say(f"image {img}, {size >> 20} MiB")
        meta = {"name": "kube-flannel", "namespace": "kube-flannel"}
        init = [{"name": "install-cni", "image": img, "command": ["/kltool", "cp", src, dst], "volumeMounts": vm} for src, dst, vm in (
            ("/flannel", "/opt/cni/bin/flannel", [{"name": "cni-plugin", "mountPath": "/opt/cni/bin"}]),
            ("/etc/kube-flannel/cni-conf.json", "/etc/cni/net.d/10-flannel.conflist", [
                {"name": "cni", "mountPath": "/etc/cni/net.d"}, {"name": "cfg", "mountPath": "/etc/kube-flannel"}]))] if a.cni else []
        for k, c in enumerate(init):
            c["name"] += f"-{k}"
        sec = {"privileged": True} if a.privileged else {"capabilities": {"add": ["NET_ADMIN", "NET_RAW"]}}
        items = [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kube-flannel", "labels": {"pod-security.kubernetes.io/enforce": "privileged"}}},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "kube-flannel"}, "rules": [
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}, {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
                {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]}]},
            {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "kube-flannel"},
             "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "kube-flannel"}, "subjects": [{"kind": "ServiceAccount", **meta}]},
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"cni-conf.json": json.dumps(chain), "net-conf.json": json.dumps(conf)}},
            {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": meta, "spec": {
                "selector": {"matchLabels": {"app": "flannel"}}, "template": {"metadata": {"labels": {"app": "flannel"}}, "spec": {
                    "hostNetwork": True, "serviceAccountName": "kube-flannel", "priorityClassName": "system-node-critical",
                    "tolerations": [{"operator": "Exists"}], "terminationGracePeriodSeconds": 5, "initContainers": init,
                    "containers": [{
                        "name": "daemon", "image": img, "command": ["/opt/bin/flanneld"], "args": flags, "securityContext": sec,
                        "env": [{"name": f"POD_{k}", "valueFrom": {"fieldRef": {"fieldPath": f"metadata.{k.lower()}"}}} for k in ("NAME", "NAMESPACE")],
                        "volumeMounts": [{"name": "run", "mountPath": "/run/flannel"}, {"name": "cfg", "mountPath": "/etc/kube-flannel"},
                                         {"name": "xtables-lock", "mountPath": "/run/xtables.lock"}]}],
                    "volumes": [{"name": "run", "hostPath": {"path": "/run/flannel", "type": "DirectoryOrCreate"}}, {"name": "cni-plugin", "hostPath": {"path": "/opt/cni/bin"}},
                                {"name": "cni", "hostPath": {"path": "/etc/cni/net.d"}}, {"name": "cfg", "configMap": {"name": "kube-flannel"}},
                                {"name": "xtables-lock", "hostPath": {"path": "/run/xtables.lock", "type": "FileOrCreate"}}]}}}}]
        print(kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items})), end="")

    def env(n):
        out = subprocess.run(in_node(st, n, ["cat", "/run/flannel/subnet.env"]), text=True, capture_output=True).stdout
        return dict(l.split("=", 1) for l in out.splitlines() if "=" in l)
    for n in nodes:
        e = until(f"/run/flannel/subnet.env on {n} (see `kubelab kubectl -n kube-flannel logs ds/kube-flannel`, {LAB}/{n}/log/daemon.log)", lambda: env(n), a.wait)
        say(n, e)
        if not a.cni:
            put(f"{LAB}/{n}/root/etc/cni/net.d/10-kubelab.conflist", json.dumps({"name": "cbr0", "cniVersion": "0.3.1", "plugins": [
                {"type": "bridge", "bridge": "cni0", "mtu": int(e["FLANNEL_MTU"]), "isDefaultGateway": True, "hairpinMode": True, "ipMasq": e["FLANNEL_IPMASQ"] == "false",
                 "ipam": {"type": "host-local", "subnet": e["FLANNEL_SUBNET"].rsplit(".", 1)[0] + ".0/" + e["FLANNEL_SUBNET"].split("/")[1], "routes": [{"dst": e["FLANNEL_NETWORK"]}]}},
                {"type": "portmap", "capabilities": {"portMappings": True}}]}))
    kubectl("wait", "--for=condition=Ready", "node", "--all", f"--timeout={a.wait}s")
    say("nodes Ready")


def cmd_pods(a):
    """One HTTP pod per node; all pairs by IP, large answers too; the service's address; the API through its service (masquerade)."""
    st = load()
    n = len(st["nodes"]) - 1
    lab = {"app": "kltest"}
    items = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kltest"}},
        {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "kltest", "namespace": "kltest"}, "spec": {
            "selector": {"matchLabels": lab}, "template": {"metadata": {"labels": lab}, "spec": {"terminationGracePeriodSeconds": 0, "containers": [
                {"name": "http", "image": TOOL_IMAGE, "args": ["serve", ":8080"], "ports": [{"containerPort": 8080, "hostPort": 8088}],
                 "readinessProbe": {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}}]}}}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kltest", "namespace": "kltest"}, "spec": {"selector": lab, "ports": [{"port": 80, "targetPort": 8080}]}}]
    if "Terminating" in kubectl("get", "ns", "kltest", check=False):
        kubectl("wait", "--for=delete", "ns/kltest", "--timeout=60s")
    kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    until("the pods", lambda: kubectl("-n", "kltest", "get", "ds", "kltest", "-o", "jsonpath={.status.desiredNumberScheduled}") == str(n), 30)
    kubectl("-n", "kltest", "rollout", "status", "ds/kltest", f"--timeout={a.wait}s")
    pods = [p for p in json.loads(kubectl("-n", "kltest", "get", "pods", "-o", "json"))["items"] if "deletionTimestamp" not in p["metadata"]]
    svc = kubectl("-n", "kltest", "get", "svc", "kltest", "-o", "jsonpath={.spec.clusterIP}")
    say("pods Running:", ", ".join(f"{p['metadata']['name']} {p['status']['podIP']} on {p['spec']['nodeName']}" for p in pods))
    bad = 0

    def check(what, argv, want, secs=0):
        nonlocal bad
        t = time.time()
        while True:
            r = subprocess.run(argv, text=True, capture_output=True, timeout=60)
            ok = r.returncode == 0 and want in r.stdout
            if ok or time.time() - t > secs:
                break
            time.sleep(0.2)
        bad += not ok
        print("ok  " if ok else "FAIL", what, "->", " ".join((r.stdout + r.stderr).replace("\x00", "").split())[:110], flush=True)
    base = ["nsenter", "--net=/run/netns/kl-ctl", f"{st['k8s']}/kubectl", f"--kubeconfig={KCONF}", "-n", "kltest", "exec"]
    for p in pods:
        me = base + [p["metadata"]["name"], "--", "/kltool", "get"]
        on = p["spec"]["nodeName"]
        for q in pods:
            ip = q["status"]["podIP"]
            check(f"pod {on} -> pod {q['spec']['nodeName']}", me + [f"http://{ip}:8080/"], "saw " + p["status"]["podIP"])
            check(f"pod {on} -> pod {q['spec']['nodeName']} 1 MiB", me + [f"http://{ip}:8080/big"], "1048576")
            check(f"node {on} -> pod {q['spec']['nodeName']}", in_node(st, on.removeprefix("kl-"), ["/lab/bin/kltool", "get", f"http://{ip}:8080/"]), "saw")
            check(f"pod {on} -> hostPort of {q['spec']['nodeName']}", me + [f"http://{q['status']['hostIP']}:8088/"], "saw")
        # kube-proxy writes a new service with up to a second's delay, which is not the daemon's
        check(f"pod {on} -> service {svc}", me + [f"http://{svc}/"] * 4, "saw", 10)
        check(f"pod {on} -> API server by its service (masqueraded)", me + [f"https://{SVC_API}/version"], "gitVersion")
    if not a.keep:
        kubectl("delete", "ns", "kltest", "--wait=false")
    say(f"{'FAILED: ' + str(bad) + ' checks' if bad else 'all checks passed'}")
    raise SystemExit(1 if bad else 0)


def cmd_status(a):
    st = load()
    total = 0
    for node, n in st["nodes"].items():
        pids = sh(in_node(st, node, ["ps", "-e", "-o", "rss=,args="])) if node != "ctl" else sh(["nsenter", "-t", str(n["init"]), "-p", "-m", "ps", "-e", "-o", "rss=,args="])
        for l in pids.splitlines():
            rss, args = l.split(None, 1)
            if int(rss) > 4000:
                print(f"{node:4} {int(rss) >> 10:5} MiB  {args[:100]}")
            total += int(rss)
    print(f"all processes {total >> 10} MiB")
    print(kubectl("get", "nodes,pods", "-A", "-o", "wide"), end="")


def cmd_restart(a):
    st = load()
    node = a.node.removeprefix("kl-")
    inner = open((f"{LAB}/{node}/root" if node != "ctl" else "") + pidfile(node, a.proc)).read().strip()
    sh(in_node(st, node, ["/bin/sh", "-c", f"kill -{a.signal} {inner} 2>/dev/null; n=0; while kill -0 {inner} 2>/dev/null; do sleep 0.1; n=$((n+1)); [ $n = 150 ] && kill -KILL {inner}; done; true"]))
    if not a.no_start:
        p = st["nodes"][node]["procs"][a.proc]
        start(st, node, a.proc, p["argv"], p["env"])
    say(f"{a.proc} on {node} {'stopped' if a.no_start else 'restarted'}")


def main():
    if os.geteuid():
        raise SystemExit("kubelab: needs root")
    p = argparse.ArgumentParser(prog="kubelab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    s = p.add_subparsers(dest="cmd", required=True)
    c = s.add_parser("up")
    c.add_argument("--nodes", type=int, default=2)
    c.add_argument("--version", default="1.34.3")
    c.add_argument("--snapshotter", default="overlayfs", choices=["overlayfs", "native"])
    c.add_argument("--proxy-mode", default="iptables", choices=["iptables", "nftables"])
    c = s.add_parser("kubectl")
    c.add_argument("args", nargs=argparse.REMAINDER)
    c = s.add_parser("node")
    c.add_argument("node")
    c.add_argument("args", nargs=argparse.REMAINDER)
    c = s.add_parser("image")
    c.add_argument("name")
    c.add_argument("binary", help="SRC[:DST]; DST defaults to /NAME and is the entry point")
    c.add_argument("extra", nargs="*", help="SRC[:DST], files or directories")
    c.add_argument("--net-tools", action="store_true", help="add iptables, nft, ip")
    c = s.add_parser("load")
    c.add_argument("archive")
    c = s.add_parser("apply")
    c.add_argument("file")
    c.add_argument("--sub", action="append", default=[], metavar="OLD=NEW", help="replace text first: --sub 10.244.0.0/16=198.18.0.0/16")
    c = s.add_parser("daemon")
    c.add_argument("path", help="a flannel-compatible daemon")
    c.add_argument("--cni", help="a flannel-compatible CNI plugin; without it a bridge conf is written from subnet.env")
    c.add_argument("--backend", default="vxlan", help="a type, or the JSON of Backend")
    c.add_argument("--iface", default="")
    c.add_argument("--nft", action="store_true", help="EnableNFTables")
    c.add_argument("--plain", action="store_true", help="as a process of the node, not as a pod")
    c.add_argument("--privileged", action="store_true")
    c.add_argument("--arg", action="append", default=[], help="one more flag for the daemon: --arg=--v=5")
    c.add_argument("--wait", type=int, default=60)
    c = s.add_parser("pods")
    c.add_argument("--keep", action="store_true")
    c.add_argument("--wait", type=int, default=60)
    c = s.add_parser("reboot")
    c.add_argument("node")
    c.add_argument("--off", type=float, default=0, help="seconds without power")
    c = s.add_parser("restart")
    c.add_argument("node")
    c.add_argument("proc")
    c.add_argument("--signal", default="TERM")
    c.add_argument("--no-start", action="store_true")
    for n in ("down", "status"):
        s.add_parser(n)
    argv = sys.argv[1:]
    at = {"kubectl": 1, "node": 2}.get(argv[0] if argv else "")
    if at:
        argv.insert(at, "--")  # whatever follows belongs to the command
    a = p.parse_args(argv)
    if at and a.args[:1] == ["--"]:
        del a.args[0]
    globals()[f"cmd_{a.cmd}"](a)


if __name__ == "__main__":
    main()
