-- Shows what the udp backend carries: IP packets behind the UDP header of port 8285, no header of its own.
--
--   tshark -X lua_script:contrib/loden.lua -r underlay.pcapng
--
-- or copy it into Wireshark's plugin folder (Help, About, Folders). The port can be changed in the protocol's
-- preferences. Without this file, `-d udp.port==8285,ip` shows IPv4 overlays.

local overlay = Proto("loden", "flannel udp overlay")
overlay.prefs.port = Pref.uint("UDP port", 8285, "Backend.Port of net-conf.json")

local ipv4 = Dissector.get("ip")
local ipv6 = Dissector.get("ipv6")
local registered = nil

function overlay.dissector(buffer, packet, tree)
    if buffer:len() < 20 then return 0 end
    local version = buffer(0, 1):uint() / 16
    if version >= 4 and version < 5 then
        ipv4:call(buffer, packet, tree)
    elseif version >= 6 and version < 7 then
        ipv6:call(buffer, packet, tree)
    else
        return 0
    end
    return buffer:len()
end

local function register()
    local ports = DissectorTable.get("udp.port")
    if registered then ports:remove(registered, overlay) end
    registered = overlay.prefs.port
    ports:add(registered, overlay)
end

overlay.prefs_changed = register
register()
