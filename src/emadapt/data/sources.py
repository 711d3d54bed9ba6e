"""Public datasets: where they are, what they weigh in on paper (licence, citation) and how their files lie.

The sha256 are those that another project's loaders publish for these archives; they were not checked here, as neither
archive could be reached. A download that does not match is refused, whichever side is wrong.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Volume:
    """A folder of images and one of labels, one file a slice, paired by the number in the name."""

    image_dir: str
    image_pattern: str  # of the whole file name; the group is the slice's number
    label_dir: str
    label_pattern: str


LAYOUTS: dict[str, tuple[Volume, ...]] = {
    # Not a mistake: the images are called mask0000.png, the labels 0.png. Sorted by name, the two do not pair.
    "lucchi": (
        Volume("Train_In", r"mask(\d+)\.png", "Train_Out", r"(\d+)\.png"),
        Volume("Test_In", r"mask(\d+)\.png", "Test_Out", r"(\d+)\.png"),
    ),
    "vnc": (Volume("raw", r"(\d+)\.tiff?", "mitochondria", r"(\d+)\.png"),),
}


@dataclass(frozen=True)
class Source:
    """A public dataset."""

    name: str
    layout: str  # a key of LAYOUTS
    urls: tuple[str, ...]  # of one zip archive, mirrors last
    sha256: str  # of the archive
    archive_root: str  # the folder in the archive that has the layout
    licence: str
    citation: str
    doi: str  # of the citation
    voxel_nm: tuple[float, float, float]  # z, y, x
    foreground: str  # label rule, as in params.yaml
    note: str


SOURCES: dict[str, Source] = {
    "lucchi": Source(
        name="lucchi",
        layout="lucchi",
        urls=(
            "http://www.casser.io/files/lucchi_pp.zip",
            # A copy by PyTorch Connectomics; used only if it is the same archive to the byte.
            "https://huggingface.co/datasets/pytc/tutorial/resolve/main/Lucchi%2B%2B.zip",
        ),
        sha256="770ce9e98fc6f29c1b1a250c637e6c5125f2b5f1260e5a7687b55a79e2e8844d",
        archive_root="Lucchi++",
        licence="research use; cite both papers",
        citation=(
            "Lucchi et al., Supervoxel-based segmentation of mitochondria in EM image stacks with learned shape features, "
            "IEEE Transactions on Medical Imaging 31 (2012). Labels: Casser et al., Fast mitochondria detection for "
            "connectomics, MIDL 2020."
        ),
        doi="10.1109/TMI.2011.2171705",
        voxel_nm=(5.0, 5.0, 5.0),
        foreground=">127",
        note="EPFL CA1 hippocampus, FIB-SEM, with the corrected labels called Lucchi++; official train and test halves.",
    ),
    "vnc": Source(
        name="vnc",
        layout="vnc",
        urls=(
            "https://github.com/unidesigner/groundtruth-drosophila-vnc/archive/refs/heads/master.zip",
        ),
        sha256="f7bd0db03c86b64440a16b60360ad60c0a4411f89e2c021c7ee2c8d6af3d7e86",
        archive_root="groundtruth-drosophila-vnc-master/stack1",
        licence="CC BY-NC-SA 3.0",
        citation=(
            "Gerhard, Funke, Martel, Cardona, Fetter, Segmented anisotropic ssTEM dataset of neural tissue, figshare (2013), "
            "doi 10.6084/m9.figshare.856713."
        ),
        doi="10.6084/m9.figshare.856713",
        voxel_nm=(50.0, 4.6, 4.6),
        foreground=">127",  # the masks are anti-aliased
        note="Drosophila larva ventral nerve cord, serial-section TEM, the annotated stack 1; 20 sections, no official split.",
    ),
}


@dataclass(frozen=True)
class Manual:
    """A public dataset that emadapt does not download: no address with a checksum is known here that leads to its files."""

    name: str
    page: str
    files: str  # which of the page's files
    place: str  # where they belong, below the dataset's folder
    settings: str  # of params.yaml
    licence: str
    citation: str
    doi: str  # of the citation
    voxel_nm: tuple[float, float, float]  # z, y, x
    note: str


_XIE = (
    "Xie et al., Transfer learning improves performance in volumetric electron microscopy organelle segmentation across tissues, "
    "Bioinformatics Advances 5 (2025), doi 10.1093/bioadv/vbaf021."
)
MANUAL: dict[str, Manual] = {
    "snemi3d": Manual(
        name="snemi3d",
        page="https://zenodo.org/records/7142003 (or the challenge, https://snemi3d.grand-challenge.org)",
        files="the training volume train-input.tif (folder image/ of the archive) and its labels train-labels.tif (seg/)",
        place="image.tif and label.tif",
        settings='{layout: stack, voxel_nm: [30, 6, 6], foreground: ">0"}',  # every neurite has an id of its own
        licence="ODC-By 1.0 for the volume that it is cut from; see the page",
        citation="Kasthuri et al., Saturated reconstruction of a volume of neocortex, Cell 162 (2015).",
        doi="10.1016/j.cell.2015.06.054",
        voxel_nm=(30.0, 6.0, 6.0),
        note="Neurites in mouse neocortex, ATUM-SEM, 100 sections of 1024 x 1024; 0 is between them.",
    ),
    "urocell": Manual(
        name="urocell",
        page="https://github.com/MancaZerovnikMekuc/UroCell",
        files=(
            "a volume of data/, e.g. fib1-0-0-0.nii.gz, and the file of the same name in mito/binary/; another such pair to "
            "test on"
        ),
        place="train/image.nii.gz and train/label.nii.gz, test/image.nii.gz and test/label.nii.gz",
        settings='{layout: stack, voxel_nm: [15, 16, 16], foreground: ">0"}',
        licence="as its repository says; not checked here",
        citation=(
            "Zerovnik Mekuc et al., Automatic segmentation of mitochondria and endolysosomes in volumetric electron microscopy "
            "data, Computers in Biology and Medicine 119 (2020), doi 10.1016/j.compbiomed.2020.103693."
        ),
        doi="10.1016/j.compbiomed.2020.103693",
        voxel_nm=(15.0, 16.0, 16.0),
        note="Mitochondria in mouse urothelial cells, FIB-SEM, volumes of 256 x 256 x 256 as NIfTI.",
    ),
    "liver_mouse": Manual(
        name="liver_mouse",
        page="https://www.ebi.ac.uk/empiar/EMPIAR-10791/",
        files=(
            "slices of one FIB-SEM liver and the slices of the same numbers of one segmentation (mitochondria, ER or lipid "
            "droplets)"
        ),
        place="images/ and labels/, one file a slice; a dataset for each organelle",
        settings='{layout: folders, voxel_nm: [8, 8, 8], foreground: ">127"}',  # masks of 0 and 255, one organelle each
        licence="as its EMPIAR entry says; not checked here",
        citation=(
            "Parlakgul et al., Regulation of liver subcellular architecture controls metabolic homeostasis, Nature 603 (2022). "
            f"Used by {_XIE}"
        ),
        doi="10.1038/s41586-022-04488-5",
        voxel_nm=(8.0, 8.0, 8.0),
        note="Mitochondria, ER and lipid droplets of mouse hepatocytes, FIB-SEM; the whole entry has terabytes: take a part.",
    ),
    "liver_rat": Manual(
        name="liver_rat",
        page="https://github.com/Xrioen/cross-tissue-transfer-learning-in-VEM, which names its Zenodo record, 13357732",
        files="the raw volume and the manual annotation of mitochondria or ER",
        place="image.tif and label.tif (or .h5, .zarr, .nii); a dataset for each organelle, if they are separate files",
        settings='{layout: stack, voxel_nm: [50, 8, 8], foreground: ">0"}',
        licence="as its Zenodo record says; not checked here",
        citation=_XIE,
        doi="10.1093/bioadv/vbaf021",
        voxel_nm=(50.0, 8.0, 8.0),
        note="Mitochondria and ER of rat liver, SBF-SEM, 219 sections of 7000 x 7000; not seen here: check the labels' values.",
    ),
}
"""What is said of files and labels is what their pages and other projects say of them; none was downloaded here."""
