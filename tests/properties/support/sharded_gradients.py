import os, sys, torch, torch.distributed as dist
sys.path.insert(0,'/work/wt/shard/tests/e2e')
torch.set_num_threads(1)
kind, shard = sys.argv[1], sys.argv[2]=='shard'
from transformers import LlamaConfig, MixtralConfig, AutoModelForCausalLM
from finetune.config.settings import *
from finetune.model.load import load_base, attach_adapter
from finetune.training.accumulate import window_gradients
from finetune.data.batches import Batch
folder=f'/tmp/proto-{kind}'
rank=int(os.environ.get('RANK',0)); size=int(os.environ.get('WORLD_SIZE',1))
if size>1: dist.init_process_group('gloo')
import contextlib
from finetune.model import parts
with (parts.kept() if shard else contextlib.nullcontext()): base=load_base(ModelConfig(model=folder,precision='nf4',device='cpu'))
model=attach_adapter(base,AdapterConfig(init='gaussian'),seed=0)
with torch.no_grad():
    g=torch.Generator().manual_seed(1)
    for n,p in model.named_parameters():
        if 'lora_B' in n: p.copy_(torch.randn(p.shape,generator=g)*.05)
before=sum(p.nbytes for p in model.parameters() if not p.requires_grad)
if shard:
    from finetune.model.shard import shard_base
    shard_base(model)
from torch.distributed.tensor import DTensor
after=sum((p.to_local() if isinstance(p,DTensor) else p).nbytes for p in model.parameters() if not p.requires_grad)
batches=[]
for i in range(4):
    ids=torch.randint(0,200,(1,9+3*i),generator=torch.Generator().manual_seed(i)); batches.append(Batch(input_ids=ids,labels=ids.clone()))
for step in range(2):
    for p in model.parameters(): p.grad=None
    st=window_gradients(model,batches[rank::size],TrainConfig())
if rank==0:
    grads={n:p.grad for n,p in model.named_parameters() if p.requires_grad and p.grad is not None}
    print('loss',st.loss,st.targets,len(grads),'frozen bytes',before,after)
    if size==1: torch.save(grads,f'/tmp/proto-{kind}.pt')
    else:
        ref=torch.load(f'/tmp/proto-{kind}.pt'); assert ref.keys()==grads.keys()
        num=sum((grads[n]-ref[n]).double().square().sum() for n in ref)**.5; den=sum(ref[n].double().square().sum() for n in ref)**.5
        print('relative distance',float(num/den))
if size>1: dist.barrier(); os._exit(0)
