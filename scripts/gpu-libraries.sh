# Sourced: puts the folders of the CUDA libraries into LD_LIBRARY_PATH.
folders=()
for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda /usr/local/cuda-13* /usr/local/cuda-12* target/cuda-toolkit/nvidia/cu13; do
  [ -n "$home" ] && folders+=("$home/lib64" "$home/lib" "$home/targets/x86_64-linux/lib")
done
folders+=(/usr/lib/x86_64-linux-gnu /usr/local/nvidia/lib64)
if command -v python3 >/dev/null; then
  while read -r site; do
    folders+=("$site"/nvidia/cu13/lib "$site"/nvidia/cublas/lib "$site"/nvidia/cudnn/lib "$site"/nvidia/cuda_nvrtc/lib)
  done < <(python3 -c 'import site, sys, sysconfig
paths = [sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], site.getusersitepackages(), *getattr(site, "getsitepackages", list)()]
paths += [p for p in sys.path if p.endswith("-packages")]
print("\n".join(dict.fromkeys(paths)))' 2>/dev/null || true)
fi

path=${LD_LIBRARY_PATH:-}
for library in libcuda.so libnvrtc.so libcublasLt.so libcudnn.so; do
  found=
  for folder in "${folders[@]}"; do
    if compgen -G "$folder/$library*" >/dev/null; then
      found=$folder
      break
    fi
  done
  if [ -n "$found" ]; then
    echo "$library: $found" >&2
    # The linker's own folders come in by themselves, and must not hide a wheel's newer libraries.
    case ":$path:" in
      *":$found:"*) ;;
      *) [ "$found" = /usr/lib/x86_64-linux-gnu ] || path=${path:+$path:}$found ;;
    esac
  else
    echo "$library: not in the usual places; left to the linker" >&2
  fi
done
export LD_LIBRARY_PATH="$path"
